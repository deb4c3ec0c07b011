"""A bounded store of image features, so that the vision tower runs once per picture and not once per question."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import count
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from crosstrim.errors import ConfigError
from crosstrim.models import mllama, vision

Digests = tuple[tuple[bytes, ...], ...]
"""What tells one picture from another: per sample, per image slot."""


class _Key(NamedTuple):
    model: int
    state: bytes
    picture: bytes


class FeatureCache:
    """The features of the pictures that were used last, found by their content. Threads may share it.

    The vision tower sees each image alone, whatever it is batched with, so features are held image by image. They
    depend on the picture and on the state of the model's vision tower: its weights, their dtype, its repairs, its
    adapters, and autocast. All of that is the key (`crosstrim.models.vision.state_of`). Only writes to weights that
    torch does not count, under `torch.inference_mode` or through `.data`, need a `clear()`.

    Attributes:
        max_bytes: bytes of features held at most; what was used longest ago goes first. A picture that needs more
            on its own is encoded every time.
        device: where they are held; None leaves them where the model made them. They are copied back when read.
    """

    def __init__(self, max_bytes: int = 1 << 30, device: str | torch.device | None = None) -> None:
        """Make an empty store.

        Raises:
            ConfigError: `max_bytes` is no whole number from 0, or `device` no device.
        """
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ConfigError(f"max_bytes={max_bytes!r} must be a whole number of bytes, 0 or more.")
        try:
            self.device = None if device is None else torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"device={device!r} is no device; give one such as 'cpu', or None.") from error
        self.max_bytes = max_bytes
        self._held: OrderedDict[_Key, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()  # of what is held, never for long
        self._encoding = threading.Lock()  # threads that want the same picture encode it once
        self._models: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._numbers = count()

    def __repr__(self) -> str:
        return f"<FeatureCache of {len(self)} images, {self.bytes} of {self.max_bytes} bytes>"

    def __len__(self) -> int:
        """Images held."""
        with self._lock:
            return len(self._held)

    @property
    def bytes(self) -> int:
        """Bytes of the features held."""
        with self._lock:
            return self._bytes()

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._held.clear()

    def features(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], pictures: Digests | None = None
    ) -> torch.Tensor:
        """What the cross-attention layers read of the images; only pictures that are not held are encoded.

        Args:
            model: a loaded Mllama.
            inputs: of the processor: pixel_values, aspect_ratio_ids and aspect_ratio_mask of B samples.
            pictures: `digests(inputs)`, when it is known already.

        Returns:
            [B, images * tiles, features per tile, hidden] where the vision tower is, for
            `crosstrim.models.vision.given`.
        """
        tower = mllama.locate(model).vision_model
        prefix, device = (self._number(tower), vision.state_of(model)), next(tower.parameters()).device
        wanted = [[_Key(*prefix, picture) for picture in sample] for sample in pictures or digests(inputs)]
        distinct = dict.fromkeys(key for sample in wanted for key in sample)
        found = self._find(distinct)
        if len(found) < len(distinct):
            with self._encoding:
                found |= self._find(key for key in distinct if key not in found)
                if missing := [key for key in distinct if key not in found]:  # no other thread was quicker
                    found |= self._encode(model, inputs, wanted, missing, device)
        return torch.stack([torch.cat([found[key].to(device) for key in sample]) for sample in wanted])

    def _number(self, tower: nn.Module) -> int:
        with self._lock:
            if tower not in self._models:
                self._models[tower] = next(self._numbers)
            return self._models[tower]

    def _find(self, keys: Iterable[_Key]) -> dict[_Key, torch.Tensor]:
        with self._lock:
            found = {key: self._held[key] for key in keys if key in self._held}
            for key in found:
                self._held.move_to_end(key)
            return found

    def _encode(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        wanted: list[list[_Key]],
        missing: list[_Key],
        device: torch.device,
    ) -> dict[_Key, torch.Tensor]:
        """Encode the `missing` ones among the `wanted`, in one pass of the tower, and hold them."""
        places = {key: (row, slot) for row, sample in enumerate(wanted) for slot, key in enumerate(sample)}
        rows, slots = (list(part) for part in zip(*(places[key] for key in missing), strict=True))
        images = {name: inputs[name][rows, slots].unsqueeze(1).to(device) for name in vision.INPUTS}
        # Each image owns its memory: a view would keep its whole batch alive.
        encoded = {key: one.clone() for key, one in zip(missing, vision.encode(model, images), strict=True)}
        held = {key: one if self.device is None else one.to(self.device) for key, one in encoded.items()}
        with self._lock:
            self._held.update(held)
            while self._held and self._bytes() > self.max_bytes:
                self._held.popitem(last=False)
        return encoded

    def _bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self._held.values())


def digests(inputs: Mapping[str, torch.Tensor]) -> Digests:
    """What tells the pictures of a batch apart.

    Args:
        inputs: of the processor: pixel_values, aspect_ratio_ids and aspect_ratio_mask of B samples.
    """
    parts = [inputs[name].cpu().contiguous() for name in vision.INPUTS]
    batch, slots = parts[0].shape[:2]
    return tuple(tuple(_digest([part[row, slot] for part in parts]) for slot in range(slots)) for row in range(batch))


def _digest(parts: Iterable[torch.Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()
