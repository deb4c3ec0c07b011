"""Pictures for the tiny model, and files of questions about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Not of Image.effect_noise, which draws on from whatever the process drew before.
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8))
QUESTIONS = ["what is left?", "how many are there, all in all?", "why?"]
KINDS = {"count": "how many?", "read": "read all the digits.", "where": "where is the 3?"}


def write_pictures(folder: Path, count: int = 4) -> None:
    """Pictures of one and of two tiles in turn."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28 * (1 + number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def write_rows(folder: Path, rows: list[dict[str, Any] | str], name: str = "questions.jsonl") -> Path:
    """Rows, or whole lines, as a JSONL file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def with_answers() -> list[dict[str, Any]]:
    """Three kinds of question about each of four pictures, with answers."""
    return [
        {"id": f"{number}-{kind}", "image": f"{number}.png", "question": question, "answers": ["?"], "kind": kind}
        for number in range(4)
        for kind, question in KINDS.items()
    ]


def without_answers(count: int = 12) -> list[dict[str, Any]]:
    """Questions about four pictures in turn."""
    return [
        {"id": f"q{number}", "image": f"{number % 4}.png", "question": f"what about {number}?"}
        for number in range(count)
    ]
