"""The held-out benchmark and the example pictures: test handwriting on test photographs, kept as JPEG files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from recipes.training.settings import LAYOUTS

from .pictures import Scene, scene
from .questions import KINDS, ask

_SEED = 31
_QUALITY = 92
PICTURES = 256
"""How many pictures a benchmark has, the same number of each layout; every picture gets a question of each kind."""

_EXAMPLES = (("cat", (2, 2), 9), ("rocket", (1, 3), 6), ("temple", (2, 1), 17))
_EXAMPLE_SCALE = 3


def _save(item: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Full colour resolution: the strokes are thin and their colour is asked for.
    Image.fromarray(item.pixels).save(path, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)


def _rows(item: Scene, image: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    layout = f"{item.layout[0]}x{item.layout[1]}"
    asked = [ask(item, kind, rng) for kind in KINDS]
    return [
        {"image": image, "question": one.text, "answers": [one.answer], "kind": one.kind, "layout": layout}
        for one in asked
    ]


def write_benchmark(folder: Path, split: str, pictures: int = PICTURES) -> Path:
    """Write the pictures and `questions.jsonl` of a benchmark over one split, and return the questions' path."""
    lines = []
    for number in range(pictures):
        rng = np.random.default_rng([_SEED, number])
        item = scene(split, LAYOUTS[number % len(LAYOUTS)], rng)
        image = f"images/{number:03d}.jpg"
        _save(item, folder / image)
        for row in _rows(item, image, rng):
            lines.append(json.dumps({"id": f"{number:03d}-{row['kind']}", **row}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_examples(folder: Path) -> None:
    """Write the example pictures, three times as large as the model sees them, and `examples.json`."""
    examples = []
    for name, layout, seed in _EXAMPLES:
        rng = np.random.default_rng([_SEED, 1, seed])
        item = scene("test", layout, rng, scale=_EXAMPLE_SCALE)
        _save(item, folder / f"{name}.jpg")
        rows = _rows(item, f"{name}.jpg", rng)
        questions = [{key: row[key] for key in ("question", "answers", "kind")} for row in rows]
        examples.append({"image": f"{name}.jpg", "layout": rows[0]["layout"], "questions": questions})
    (folder / "examples.json").write_text(json.dumps(examples, indent=2) + "\n", encoding="utf-8")
