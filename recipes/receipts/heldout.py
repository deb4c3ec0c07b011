"""The held-out benchmark: pages in typefaces that training never saw, kept as JPEG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from recipes.training.files import others_alike, save, write_questions

from .pages import KINDS as PAGES
from .pages import LAYOUTS, page
from .questions import KINDS, ask

_SEED = 53
COUNT = 320
"""How many pages a benchmark has, as many of each kind; every page gets a question of each kind that it can."""


def write_benchmark(folder: Path, split: str, count: int = COUNT) -> Path:
    """Write the pages and `questions.jsonl` of a benchmark over one split, and return the questions' path.

    `blind.jsonl` beside it asks the same questions about other pages: what is answered right there was guessed.
    """
    rows: list[dict[str, Any]] = []
    for number in range(count):
        rng = np.random.default_rng([_SEED, number])
        kind = PAGES[number % len(PAGES)]
        layouts = LAYOUTS[kind]
        drawn = page(split, kind, layouts[number // len(PAGES) % len(layouts)], rng)
        image = f"images/{number:03d}.jpg"
        save(drawn.pixels, folder / image)
        for asked in filter(None, (ask(drawn, one, rng) for one in KINDS)):
            row = {"id": f"{number:03d}-{asked.kind}", "image": image, "question": asked.text}
            row |= {"answers": [asked.answer], "kind": asked.kind, "page": kind}
            rows.append(row | {"layout": f"{drawn.layout[0]}x{drawn.layout[1]}"})
    others = others_alike(rows, "page", "layout")
    write_questions(folder, [row | {"image": others[row["image"]]} for row in rows], "blind")
    return write_questions(folder, rows)
