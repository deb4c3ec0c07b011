"""What mini learns: which pictures in which stage, and what is asked about them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from recipes.training.settings import LAYOUTS, MAX_TILES, Settings
from recipes.training.task import JOINT, Head, Question, Task
from recipes.training.tiles import IGNORE

from .pictures import (
    FEWEST,
    MOST,
    NO_COLOUR,
    NO_DIGIT,
    NO_RANK,
    PLACES,
    Scene,
    crowd,
    patch_labels,
    scene,
)
from .questions import MOSTLY_READING, MOSTLY_WHOLE, WHOLE, corpus, lesson
from .settings import SETTINGS

WORDS = 408
SEGMENT = 21
PATCHES = {
    "digit": Head(NO_DIGIT + 1, weight=1.0, nothing=NO_DIGIT),
    "colour": Head(NO_COLOUR + 1, weight=0.5, nothing=NO_COLOUR),
    "rank": Head(NO_RANK + 1, weight=0.5, nothing=NO_RANK),
    "place": Head(len(PLACES), weight=0.2),
}
PICTURES = {"count": Head(MOST - FEWEST + 1, weight=0.2)}
_FULL_LAYOUTS = tuple(layout for layout in LAYOUTS if layout[0] * layout[1] == MAX_TILES)


def task(settings: Settings = SETTINGS) -> Task[Scene]:
    """Return mini's task with these settings."""
    return Task(
        settings=settings,
        corpus=corpus,
        words=WORDS,
        segment=SEGMENT,
        patches=PATCHES,
        whole=PICTURES,
        labels=labels,
        draw=lambda split, rng: scene(split, LAYOUTS[rng.integers(len(LAYOUTS))], rng),
        draw_crowd=draw_crowd,
        lesson=partial(_lesson, settings),
    )


def draw_crowd(rng: np.random.Generator, progress: float) -> Scene:
    """Draw a training crowd, mostly on four tiles: padding tiles cost as much as real ones."""
    # Digits on the corners of the patch grid are read soon; from there the encoder learns to read them anywhere.
    looseness = float(np.interp(progress, (0.0, 0.5), (0.1, 0.5)))
    layouts = _FULL_LAYOUTS if rng.random() < 0.7 else LAYOUTS
    return crowd("train", layouts[rng.integers(len(layouts))], rng, looseness)


def _lesson(settings: Settings, item: Scene, stage: int, step: int, rng: np.random.Generator) -> list[Question]:
    """Ask more about the whole picture in the joint stage, and in the end most of all to read it."""
    late = MOSTLY_READING if step >= settings.reading_from else MOSTLY_WHOLE
    return lesson(item, settings.segments, rng, late if stage == JOINT else WHOLE)


def labels(item: Scene) -> dict[str, Any]:
    """Return what the heads should say of a picture; nobody counts a crowd."""
    ordinary = bool(item.digits and item.digits[0].place)
    return {**patch_labels(item), "count": len(item.digits) - FEWEST if ordinary else IGNORE}
