"""The embedded model "mini": where its checkpoint, its held-out benchmark and its example pictures lie.

Nothing heavy is imported here; `crosstrim.load("mini")` loads the model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUICK = 2
"""Held-out questions of each kind and tile layout that a quick run asks."""

_HERE = Path(__file__).parent


def path() -> Path:
    """Return the checkpoint's folder, for `from_pretrained`; the model card is its README.md."""
    return _HERE / "checkpoint"


def heldout() -> list[dict[str, Any]]:
    """Return the held-out questions, on handwriting and photographs that training never saw.

    Returns:
        One dictionary per question: `id`, `image` (an absolute path), `question`, `answers` (any of them is right),
        `kind` and `layout` (rows x columns of tiles).
    """
    folder = _HERE / "heldout"
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "image": str(folder / row["image"])} for row in rows]


def select(questions: Sequence[dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """All held-out questions, or the first few of each kind and layout, in their order."""
    if not quick:
        return list(questions)
    taken: dict[tuple[str, str], int] = defaultdict(int)
    chosen = []
    for question in questions:
        cell = question["kind"], question["layout"]
        taken[cell] += 1
        if taken[cell] <= QUICK:
            chosen.append(question)
    return chosen


def examples() -> list[dict[str, Any]]:
    """Return a few held-out pictures to show the model on.

    Returns:
        One dictionary per picture: `image` (an absolute path), `layout`, and `questions`, each with its `question`,
        `answers` and `kind`.
    """
    folder = _HERE / "examples"
    rows = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return [{**row, "image": str(folder / row["image"])} for row in rows]
