from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import crosstrim

QUESTIONS = {"count": "how many?", "read": "read all the digits.", "where": "where is the 3?"}


def write_pictures(folder):
    """Four pictures, of one and of two tiles in turn."""
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28 * (1 + number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def write_rows(folder, rows):
    """Rows, or whole lines, as a JSONL file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def all_rows():
    """Three kinds of question about each picture."""
    return [
        {"id": f"{number}-{kind}", "image": f"{number}.png", "question": question, "answers": ["?"], "kind": kind}
        for number in range(4)
        for kind, question in QUESTIONS.items()
    ]


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """The tiny model and its processor; nobody changes them for good."""
    return crosstrim.load(checkpoint)


@pytest.fixture
def rows():
    return all_rows()


@pytest.fixture
def write(tmp_path):
    """Write rows beside the pictures that they name."""
    write_pictures(tmp_path)
    return lambda rows: write_rows(tmp_path, rows)
