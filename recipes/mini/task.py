"""What mini learns: which pictures in which stage, and what is asked about them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from recipes.training.language import JOINT
from recipes.training.settings import LAYOUTS, MAX_TILES, Settings
from recipes.training.task import Head, Task
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
from .questions import MOSTLY_READING, MOSTLY_WHOLE, WHOLE, Question, corpus, lesson
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
_CROWDED_SHARE = 0.6
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
        draw_vision=partial(draw_vision, settings),
        draw_language=partial(draw_language, settings),
        draw_crowds=lambda rng: [draw_crowd(rng) for _ in range(settings.joint_crowds)],
        draw_validation=lambda index: _scene("validation", np.random.default_rng([11, index])),
    )


def _scene(split: str, rng: np.random.Generator) -> Scene:
    return scene(split, LAYOUTS[rng.integers(len(LAYOUTS))], rng)


def draw_vision(settings: Settings, step: int) -> list[Scene]:
    """Draw the pictures of one step: crowds, and ever more ordinary pictures among them."""
    rng = np.random.default_rng([settings.seed, 1, step])
    progress = step / settings.vision_steps
    crowded = 1.0 if progress < 0.4 else _CROWDED_SHARE
    # Digits on the corners of the patch grid are read soon; from there the encoder learns to read them anywhere.
    looseness = float(np.interp(progress, (0.0, 0.5), (0.1, 0.5)))
    return [
        draw_crowd(rng, looseness) if rng.random() < crowded else _scene("train", rng)
        for _ in range(settings.vision_batch)
    ]


def draw_crowd(rng: np.random.Generator, looseness: float = 0.5) -> Scene:
    """Draw a training crowd, mostly on four tiles: padding tiles cost as much as real ones."""
    layouts = _FULL_LAYOUTS if rng.random() < 0.7 else LAYOUTS
    return crowd("train", layouts[rng.integers(len(layouts))], rng, looseness)


def draw_language(
    settings: Settings, stage: int, step: int, rng: np.random.Generator
) -> tuple[list[Scene], list[list[Question]]]:
    """Draw new pictures over all layouts, several questions about each; the joint stage asks more of the whole."""
    scenes = [_scene("train", rng) for _ in range(settings.language_batch)]
    late = MOSTLY_READING if step >= settings.reading_from else MOSTLY_WHOLE
    whole = late if stage == JOINT else WHOLE
    return scenes, [lesson(item, settings.segments, rng, whole) for item in scenes]


def labels(item: Scene) -> dict[str, Any]:
    """Return what the heads should say of a picture; nobody counts a crowd."""
    ordinary = bool(item.digits and item.digits[0].place)
    return {**patch_labels(item), "count": len(item.digits) - FEWEST if ordinary else IGNORE}
