"""Pictures of coloured handwritten digits on photographs, and what every patch of them shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from recipes.training import files
from recipes.training.tiles import IGNORE, label_tiles

from .digits import Stamp, stamps, stamps_by_value
from .photos import of_split
from .settings import PATCH, TILE

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (238, 36, 36),
    "orange": (255, 140, 15),
    "yellow": (250, 235, 40),
    "green": (40, 200, 50),
    "cyan": (50, 230, 240),
    "blue": (60, 95, 255),
    "pink": (255, 95, 215),
    "white": (250, 250, 250),
}
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
FEWEST, MOST = 2, 5
"""How many digits a picture holds."""

NO_DIGIT, NO_COLOUR, NO_RANK = 10, len(COLOURS), MOST
_PATCHES = TILE // PATCH


@dataclass(frozen=True)
class Digit:
    """One digit of a picture: what, in which colour, in which of the nine places, and its box in pixels."""

    value: int
    colour: str
    place: str
    centre: tuple[float, float]
    side: int


@dataclass(frozen=True)
class Scene:
    """A picture and the digits on it, in reading order: rows from the top, each from the left."""

    pixels: np.ndarray
    layout: tuple[int, int]
    digits: tuple[Digit, ...]


@cache
def _photographs(split: str) -> tuple[Image.Image, ...]:
    return tuple(photo.load() for photo in of_split(split))


def background(split: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return a dimmed crop of a photograph as floats of shape [height, width, 3]."""
    photographs = _photographs(split)
    photograph = photographs[rng.integers(len(photographs))]
    largest = min(photograph.width / width, photograph.height / height)
    zoom = largest * rng.uniform(0.35, 1.0)
    left = rng.uniform(0, photograph.width - width * zoom)
    top = rng.uniform(0, photograph.height - height * zoom)
    box = (left, top, left + width * zoom, top + height * zoom)
    crop = photograph.resize((width, height), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    canvas = np.asarray(crop, np.float32)
    if rng.random() < 0.5:
        canvas = canvas[:, ::-1]
    if split == "train":
        canvas = canvas[..., rng.permutation(3)] * rng.uniform(0.6, 1.2, 3).astype(np.float32)
    return canvas * np.float32(rng.uniform(0.4, 0.7))


def paint(
    canvas: np.ndarray, stamp: Stamp, colour: str, centre: tuple[float, float], rng: np.random.Generator
) -> None:
    """Paint a digit onto the canvas, in place, in one colour with a dark halo."""
    box = stamp.ink.shape[0]
    left, top = round(centre[0] - box / 2), round(centre[1] - box / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + box, canvas.shape[1]), min(top + box, canvas.shape[0])
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    shade = np.asarray(COLOURS[colour], np.float32) * rng.uniform(0.88, 1.0) + rng.uniform(-10, 10, 3)
    region = canvas[y0:y1, x0:x1]
    region *= 1 - 0.85 * stamp.halo[inside]
    region += stamp.ink[inside] * (shade.astype(np.float32) - region)


def centre_in(place: int, width: int, height: int, rng: np.random.Generator, scale: int) -> tuple[float, float]:
    """Return a random point of one of the nine cells, clear of the borders between cells."""
    cell = np.array([width / 3, height / 3])
    slack = cell / 2 - np.maximum(16.5 * scale, 0.2 * cell)
    middle = cell * (np.array([place % 3, place // 3]) + 0.5)
    x, y = middle + rng.uniform(-1, 1, 2) * slack
    return float(x), float(y)


def finish(canvas: np.ndarray, rng: np.random.Generator, rough: bool) -> np.ndarray:
    """Return the canvas as bytes, with signs of wear if it is `rough`; colours keep their full resolution."""
    return files.finish(canvas, rng, rough, noise=6, quality=(80, 96), subsampling=0)


def scene(split: str, layout: tuple[int, int], rng: np.random.Generator, scale: int = 1) -> Scene:
    """Draw a picture of a few digits, all different, in different colours and places.

    Args:
        split: Whose handwriting and photographs to use.
        layout: Rows and columns of tiles.
        rng: Decides everything else.
        scale: Draws everything this much larger, which the processor undoes.
    """
    height, width = layout[0] * TILE * scale, layout[1] * TILE * scale
    canvas = background(split, width, height, rng)
    count = int(rng.integers(FEWEST, MOST + 1))
    values = rng.choice(10, count, replace=False)
    colours = rng.choice(list(COLOURS), count, replace=False)
    digits = []
    for value, colour, place in zip(values, colours, sorted(rng.choice(9, count, replace=False)), strict=True):
        choices = stamps_by_value(split)[value]
        chosen = choices[rng.integers(len(choices))].enlarged(scale)
        centre = centre_in(int(place), width, height, rng, scale)
        paint(canvas, chosen, str(colour), centre, rng)
        digits.append(Digit(int(value), str(colour), PLACES[place], centre, chosen.side))
    return Scene(finish(canvas, rng, rough=split == "train"), layout, tuple(digits))


def crowd(split: str, layout: tuple[int, int], rng: np.random.Generator, looseness: float = 0.5) -> Scene:
    """Draw a picture densely filled with digits, repeats and all: many examples for the vision encoder at once.

    Args:
        split: Whose handwriting and photographs to use.
        layout: Rows and columns of tiles.
        rng: Decides everything else.
        looseness: How far, in patches, a digit may lie off the corners of the patch grid; 0.5 is anywhere.
    """
    height, width = layout[0] * TILE, layout[1] * TILE
    canvas = background(split, width, height, rng)
    names = list(COLOURS)
    choices = stamps(split)
    digits = []
    first_column, first_row = rng.integers(1, 3), rng.integers(1, 4)
    for row in range(first_row, height // PATCH, 3):
        for column in range(first_column, width // PATCH, 2):
            if rng.random() < 0.25:
                continue
            x, y = (np.array([column, row]) + rng.uniform(-looseness, looseness, 2)) * PATCH
            chosen, colour = choices[rng.integers(len(choices))], names[rng.integers(len(names))]
            paint(canvas, chosen, colour, (x, y), rng)
            digits.append(Digit(chosen.value, colour, "", (x, y), chosen.side))
    return Scene(finish(canvas, rng, rough=split == "train"), layout, tuple(digits))


def patch_labels(item: Scene) -> dict[str, np.ndarray]:
    """Return what each patch shows: arrays [MAX_TILES, patches], `IGNORE` where there is nothing to learn.

    `digit`, `colour` and `rank` (the place in reading order) belong to the digit whose box covers the patch's centre;
    `place` is the patch's own cell of the nine; `rank` is ignored on crowds.
    """
    rows, columns = item.layout[0] * _PATCHES, item.layout[1] * _PATCHES
    y, x = np.mgrid[:rows, :columns] * PATCH + PATCH / 2
    is_crowd = bool(item.digits) and not item.digits[0].place
    labels = {
        "digit": np.full((rows, columns), NO_DIGIT),
        "colour": np.full((rows, columns), NO_COLOUR),
        "rank": np.full((rows, columns), IGNORE if is_crowd else NO_RANK),
        "place": (y * 3 // (rows * PATCH)).astype(int) * 3 + (x * 3 // (columns * PATCH)).astype(int),
    }
    names = list(COLOURS)
    for rank, digit in enumerate(item.digits):
        distance = np.maximum(np.abs(x - digit.centre[0]) * 1.2, np.abs(y - digit.centre[1]))
        near, covered = distance < digit.side / 2 + 4, distance < digit.side / 2
        values = {"digit": digit.value, "colour": names.index(digit.colour), "rank": IGNORE if is_crowd else rank}
        for name, value in values.items():
            blank = labels[name] == {"digit": NO_DIGIT, "colour": NO_COLOUR, "rank": NO_RANK}[name]
            labels[name][near & blank] = IGNORE
            labels[name][covered] = value
    return label_tiles(labels, item.layout)
