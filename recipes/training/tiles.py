"""Pictures as the model takes them: cut into tiles, padded to four, with the id of their arrangement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .settings import LAYOUTS, MAX_TILES

IGNORE = -100
"""The label of what is not to be learned; cross entropy leaves it out."""


class Picture(Protocol):
    """Anything that was drawn: its bytes [height, width, 3], and its rows and columns of tiles."""

    pixels: np.ndarray
    layout: tuple[int, int]


def to_tiles(pixels: np.ndarray, layout: tuple[int, int]) -> np.ndarray:
    """Cut a canvas of shape [rows*side, columns*side, ...] into [MAX_TILES, side, side, ...], padded with zeros."""
    rows, columns = layout
    side = pixels.shape[0] // rows
    tiles = pixels.reshape(rows, side, columns, side, *pixels.shape[2:]).swapaxes(1, 2)
    tiles = tiles.reshape(rows * columns, side, side, *pixels.shape[2:])
    return np.concatenate([tiles, np.zeros((MAX_TILES - rows * columns, *tiles.shape[1:]), tiles.dtype)])


def label_tiles(labels: dict[str, np.ndarray], layout: tuple[int, int]) -> dict[str, np.ndarray]:
    """Cut labels of a canvas's patches into [MAX_TILES, patches of a tile]; absent tiles are ignored."""
    absent = np.arange(MAX_TILES) >= layout[0] * layout[1]
    tiled = {name: to_tiles(value, layout).reshape(MAX_TILES, -1) for name, value in labels.items()}
    return {name: np.where(absent[:, None], IGNORE, value) for name, value in tiled.items()}


def layout_id(layout: tuple[int, int]) -> int:
    """Return the processor's id of an arrangement of tiles."""
    return LAYOUTS.index(layout) + 1


def image_inputs(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """Return the model's image inputs for a batch of pictures, one each: bytes, to be scaled by `vision.encode`."""
    tiles = np.stack([to_tiles(item.pixels, item.layout) for item in pictures])
    present = [[index < item.layout[0] * item.layout[1] for index in range(MAX_TILES)] for item in pictures]
    return {
        "tiles": torch.from_numpy(tiles),
        "aspect_ratio_ids": torch.tensor([[layout_id(item.layout)] for item in pictures]),
        "aspect_ratio_mask": torch.tensor(present).long()[:, None],
    }
