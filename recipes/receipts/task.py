"""What the model learns: which pages in which stage, and what is asked about them."""

from __future__ import annotations

from functools import partial

import numpy as np
from recipes.training.settings import Settings
from recipes.training.task import Head, Task

from .pages import KINDS, LAYOUTS, NO_LINE, NO_WORD, Page, crowd, page, patch_labels
from .questions import Question, corpus, lesson
from .settings import SETTINGS

WORDS = 1021
SEGMENT = 24
PATCHES = {
    "word": Head(NO_WORD + 1, weight=1.0, nothing=NO_WORD),
    "line": Head(NO_LINE + 1, weight=0.3, nothing=NO_LINE),
    "entry": Head(NO_WORD + 1, weight=0.5, nothing=NO_WORD),
}
_CROWDED_SHARE = 0.6


def task(settings: Settings = SETTINGS) -> Task[Page]:
    """Return the task with these settings."""
    return Task(
        settings=settings,
        corpus=corpus,
        words=WORDS,
        segment=SEGMENT,
        patches=PATCHES,
        whole={},
        labels=patch_labels,
        draw_vision=partial(draw_vision, settings),
        draw_language=partial(draw_language, settings),
        draw_crowds=lambda rng: [draw_crowd(rng) for _ in range(settings.joint_crowds)],
        draw_validation=lambda index: draw_page("validation", np.random.default_rng([11, index])),
    )


def draw_page(split: str, rng: np.random.Generator) -> Page:
    """Draw a page of any kind, in one of its layouts."""
    kind = KINDS[rng.integers(len(KINDS))]
    layouts = LAYOUTS[kind]
    return page(split, kind, layouts[rng.integers(len(layouts))], rng)


def draw_crowd(rng: np.random.Generator) -> Page:
    """Draw a training page full of words, in one of the layouts."""
    layouts = ((2, 2), (2, 2), (4, 1), (1, 4))
    return crowd("train", layouts[rng.integers(len(layouts))], rng)


def draw_vision(settings: Settings, step: int) -> list[Page]:
    """Draw the pages of one step: crowds, and later also pages that mean something."""
    rng = np.random.default_rng([settings.seed, 1, step])
    crowded = 1.0 if step < 0.4 * settings.vision_steps else _CROWDED_SHARE
    return [
        draw_crowd(rng) if rng.random() < crowded else draw_page("train", rng) for _ in range(settings.vision_batch)
    ]


def draw_language(
    settings: Settings, stage: int, step: int, rng: np.random.Generator
) -> tuple[list[Page], list[list[Question]]]:
    """Draw new pages, and several questions about each."""
    pages = [draw_page("train", rng) for _ in range(settings.language_batch)]
    return pages, [lesson(one, settings.segments, rng) for one in pages]
