from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

import crosstrim

collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["test_sglang_*.py"]


def write_pictures(folder, count=4):
    """Pictures of one and of two tiles in turn."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28 * (1 + number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture
def pictures(tmp_path):
    """A folder with four pictures."""
    write_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def questions(pictures):
    """A file of twelve good rows beside the pictures, and how to write another."""

    def write(rows=None, name="rows.jsonl"):
        rows = good_rows() if rows is None else rows
        path = pictures / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def good_rows(count=12):
    return [
        {"id": f"q{number}", "image": f"{number % 4}.png", "question": f"what about {number}?"}
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """The tiny model and its processor; nobody changes them for good."""
    return crosstrim.load(checkpoint)
