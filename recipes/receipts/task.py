"""What the model learns: which pages in which stage, and what is asked about them."""

from __future__ import annotations

import numpy as np
from recipes.training.settings import Settings
from recipes.training.task import Head, Task

from .pages import KINDS, LAYOUTS, NO_FOLLOW, NO_KEY, NO_LINE, NO_TENS, NO_WORD, Page, crowd, page, patch_labels
from .questions import corpus, lesson
from .settings import SETTINGS
from .words import LETTERED, WORDS

TOKENS = 802
SEGMENT = 24
PATCHES = {
    "word": Head(NO_WORD + 1, weight=1.0, nothing=NO_WORD, words=WORDS),
    "tens": Head(NO_TENS + 1, weight=0.5),
    "ones": Head(10, weight=0.5),
    "line": Head(NO_LINE + 1, weight=0.5, nothing=NO_LINE),
    "entry": Head(NO_KEY + 1, weight=0.5, nothing=NO_KEY, words=LETTERED, turned=True),
    "follow": Head(NO_FOLLOW + 1, weight=0.5, nothing=NO_FOLLOW),
}


def task(settings: Settings = SETTINGS) -> Task[Page]:
    """Return the task with these settings."""
    return Task(
        settings=settings,
        corpus=corpus,
        words=TOKENS,
        segment=SEGMENT,
        patches=PATCHES,
        whole={},
        labels=patch_labels,
        draw=draw_page,
        draw_crowd=draw_crowd,
        lesson=lambda one, stage, step, rng: lesson(one, settings.segments, rng),
    )


def draw_page(split: str, rng: np.random.Generator) -> Page:
    """Draw a page of any kind, in one of its layouts."""
    kind = KINDS[rng.integers(len(KINDS))]
    layouts = LAYOUTS[kind]
    return page(split, kind, layouts[rng.integers(len(layouts))], rng)


def draw_crowd(rng: np.random.Generator, progress: float) -> Page:
    """Draw a training page full of words, in one of the layouts; from the first step on words stand anywhere."""
    layouts = ((2, 2), (2, 2), (1, 4))
    return crowd("train", layouts[rng.integers(len(layouts))], rng)
