"""Image features by what the picture's file holds, so that a picture asked about again is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from crosstrim.models import vision

_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class FeatureCache:
    """The features of the pictures that were used last, for one thread.

    Args:
        max_bytes: of features that are kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def features(
        self, model: Any, inputs: Mapping[str, torch.Tensor], names: Sequence[Sequence[str]]
    ) -> torch.Tensor:
        """What `crosstrim.models.vision.given` takes, encoding only pictures that are new.

        Args:
            model: of `crosstrim.load`.
            inputs: of the processor, on the model's device.
            names: [B, images] of the pictures.

        Returns:
            [B, images * tiles, features per tile, hidden].
        """
        places = {name: (b, i) for b, sample in enumerate(names) for i, name in enumerate(sample)}
        found = {name: self._features[name] for name in places if name in self._features}
        new = [name for name in places if name not in found]
        self.hits, self.misses = self.hits + len(found), self.misses + len(new)
        if new:
            rows, columns = (list(axis) for axis in zip(*(places[name] for name in new), strict=True))
            encoded = vision.encode(model, {name: inputs[name][rows, columns].unsqueeze(1) for name in _INPUTS})
            # Clones, so that one picture's features do not keep those of its batch in memory.
            found |= {name: one.clone() for name, one in zip(new, encoded, strict=True)}
        for name in places:
            self._keep(name, found[name])
        return torch.stack([torch.cat([found[name] for name in sample]) for sample in names])

    def _keep(self, name: str, features: torch.Tensor) -> None:
        if name not in self._features:
            self.bytes += features.nbytes
        self._features[name] = features
        self._features.move_to_end(name)
        while self.bytes > self._max_bytes:
            self.bytes -= self._features.popitem(last=False)[1].nbytes
