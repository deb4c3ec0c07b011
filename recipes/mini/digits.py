"""Real handwriting: scikit-learn's 8x8 digits, split by image and drawn as soft stamps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLITS = ("train", "validation", "test")
_SPLIT_SEED = 7
_HELD_OUT = {"validation": 200, "test": 400}
_TRAIN_VARIANTS = 10
GLYPH_SIDES = (27, 33)
"""Smallest and largest side of a drawn digit, in pixels of the canvas."""


@dataclass(frozen=True)
class Stamp:
    """A digit ready to be painted: how much colour, and how much shade around it, each in [0, 1]."""

    value: int
    side: int
    ink: np.ndarray
    halo: np.ndarray

    def enlarged(self, scale: int) -> Stamp:
        """Return the stamp drawn `scale` times as large."""
        if scale == 1:
            return self
        box = self.ink.shape[0] * scale
        ink, halo = (
            np.asarray(Image.fromarray(layer[..., 0]).resize((box, box), Image.Resampling.BICUBIC)).clip(0, 1)[
                ..., None
            ]
            for layer in (self.ink, self.halo)
        )
        return Stamp(self.value, self.side * scale, ink, halo)


@cache
def split_indices(split: str) -> np.ndarray:
    """Return the indices, in scikit-learn's data set, of the digit images of one split."""
    labels = load_digits().target
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=_HELD_OUT["test"], stratify=labels, random_state=_SPLIT_SEED
    )
    train, validation = train_test_split(
        rest, test_size=_HELD_OUT["validation"], stratify=labels[rest], random_state=_SPLIT_SEED
    )
    return {"train": train, "validation": validation, "test": test}[split]


def stamp(image: np.ndarray, value: int, rng: np.random.Generator, wild: bool) -> Stamp:
    """Draw one 8x8 digit smoothly.

    Args:
        image: 8x8 array of grey levels from 0 to 16.
        value: The digit it shows.
        rng: Decides the size, and the distortion if `wild`.
        wild: Whether to turn, slant and thicken it at random, as training does.
    """
    side = int(rng.integers(GLYPH_SIDES[0], GLYPH_SIDES[1] + 1))
    turn, slant, stretch = rng.uniform((-0.12, -0.1, 0.92), (0.12, 0.1, 1.08)) if wild else (0.0, 0.0, 1.0)
    box = side + 12
    step = 8 / side
    cosine, sine = np.cos(turn) * step, np.sin(turn) * step
    matrix = np.array([[cosine / stretch, sine + slant * step], [-sine, cosine]])
    offset = 4 - matrix @ np.array([box / 2, box / 2])
    # A border of blank pixels keeps the interpolation from smearing strokes that touch the edge.
    framed = Image.fromarray(np.pad(image, 4).astype(np.float32))
    coefficients = (*matrix[0], offset[0] + 4, *matrix[1], offset[1] + 4)
    drawn = framed.transform((box, box), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    threshold = rng.uniform(3.2, 4.8) if wild else 4.0
    ink = np.clip((np.asarray(drawn) - threshold) / 5.0, 0, 1)
    soft = Image.fromarray((ink * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2.5))
    halo = np.clip(np.asarray(soft, np.float32) / 255 * 2.5, 0, 1)
    return Stamp(value, side, ink[..., None].astype(np.float32), halo[..., None])


@cache
def stamps(split: str) -> tuple[Stamp, ...]:
    """Return the stamps of a split: several distortions of each training digit, each held-out digit as it is."""
    data = load_digits()
    rng = np.random.default_rng([_SPLIT_SEED, SPLITS.index(split)])
    variants = _TRAIN_VARIANTS if split == "train" else 1
    return tuple(
        stamp(data.images[index], int(data.target[index]), rng, wild=split == "train")
        for index in split_indices(split)
        for _ in range(variants)
    )


@cache
def stamps_by_value(split: str) -> tuple[tuple[Stamp, ...], ...]:
    """Return the stamps of a split, grouped by the digit they show."""
    return tuple(tuple(item for item in stamps(split) if item.value == value) for value in range(10))
