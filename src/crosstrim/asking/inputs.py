"""A batch's inputs together with its pictures' features, so that some of its samples can be asked again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from crosstrim.models import vision


class Inputs(dict[str, torch.Tensor]):
    """What the processor made of prompts, and the features that forward passes on it read meanwhile.

    Args:
        made: of the processor, padded on the left, where the model is.
        features: of `crosstrim.models.vision.encode`, or None where the prompts have no pictures.
    """

    def __init__(self, made: Mapping[str, torch.Tensor], features: torch.Tensor | None) -> None:
        super().__init__(made)
        self._features = features

    @contextlib.contextmanager
    def given(self, model: Any) -> Iterator[Inputs]:
        """Inside the block forward passes of this batch read the features and encode no picture."""
        with contextlib.ExitStack() as stack:
            if self._features is not None:
                stack.enter_context(vision.given(model, self._features))
            yield self

    def part(self, samples: Sequence[int]) -> Inputs:
        """The inputs of some samples, without the padding that only the others needed.

        Args:
            samples: places in the batch, at least one.
        """
        rows = torch.tensor(list(samples), device=self["input_ids"].device)
        length = self["input_ids"].shape[1]
        begins = length - int(self["attention_mask"][rows].sum(-1).max())
        of_tokens = ("input_ids", "attention_mask", "cross_attention_mask")
        chosen = {name: tensor[rows] for name, tensor in self.items()}
        chosen |= {name: chosen[name][:, begins:] for name in of_tokens if name in chosen}
        return Inputs(chosen, None if self._features is None else self._features[rows.to(self._features.device)])
