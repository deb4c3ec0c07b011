"""The held-out benchmark and the example pictures: test handwriting on test photographs, kept as JPEG files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from recipes.training.files import save, write_questions
from recipes.training.settings import LAYOUTS

from .pictures import Scene, scene
from .questions import KINDS, ask

_SEED = 31
PICTURES = 256
"""How many pictures a benchmark has, the same number of each layout; every picture gets a question of each kind."""

_EXAMPLES = (("cat", (2, 2), 9), ("rocket", (1, 3), 6), ("temple", (2, 1), 17))
_EXAMPLE_SCALE = 3


def _rows(item: Scene, image: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    layout = f"{item.layout[0]}x{item.layout[1]}"
    asked = [ask(item, kind, rng) for kind in KINDS]
    return [
        {"image": image, "question": one.text, "answers": [one.answer], "kind": one.kind, "layout": layout}
        for one in asked
    ]


def write_benchmark(folder: Path, split: str, pictures: int = PICTURES) -> Path:
    """Write the pictures and `questions.jsonl` of a benchmark over one split, and return the questions' path."""
    rows = []
    for number in range(pictures):
        rng = np.random.default_rng([_SEED, number])
        item = scene(split, LAYOUTS[number % len(LAYOUTS)], rng)
        image = f"images/{number:03d}.jpg"
        save(item.pixels, folder / image)
        rows += [{"id": f"{number:03d}-{row['kind']}", **row} for row in _rows(item, image, rng)]
    return write_questions(folder, rows)


def write_examples(folder: Path) -> None:
    """Write the example pictures, three times as large as the model sees them, and `examples.json`."""
    examples = []
    for name, layout, seed in _EXAMPLES:
        rng = np.random.default_rng([_SEED, 1, seed])
        item = scene("test", layout, rng, scale=_EXAMPLE_SCALE)
        save(item.pixels, folder / f"{name}.jpg")
        rows = _rows(item, f"{name}.jpg", rng)
        questions = [{key: row[key] for key in ("question", "answers", "kind")} for row in rows]
        examples.append({"image": f"{name}.jpg", "layout": rows[0]["layout"], "questions": questions})
    (folder / "examples.json").write_text(json.dumps(examples, indent=2) + "\n", encoding="utf-8")
