from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import crosstrim

QUESTIONS = {"count": "how many?", "read": "read all the digits.", "where": "where is the 3?"}


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """The tiny model and its processor; nobody changes them for good."""
    return crosstrim.load(checkpoint)


@pytest.fixture
def rows():
    """Four pictures of two layouts with three kinds of question each, as rows of a file."""
    return [
        {"id": f"{number}-{kind}", "image": f"{number}.png", "question": question, "answers": ["?"], "kind": kind}
        for number in range(4)
        for kind, question in QUESTIONS.items()
    ]


@pytest.fixture
def write(tmp_path):
    """Write rows, or whole lines, as a JSONL file beside the pictures that they name."""
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28 * (1 + number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")

    def to_file(rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return to_file
