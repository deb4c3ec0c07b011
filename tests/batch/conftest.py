from __future__ import annotations

import pytest

from tests.support.questions import without_answers, write_pictures, write_rows


@pytest.fixture
def pictures(tmp_path):
    """A folder with four pictures."""
    write_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def questions(pictures):
    """A file of twelve good rows beside the pictures, and how to write another."""

    def write(rows=None, name="rows.jsonl"):
        return write_rows(pictures, without_answers() if rows is None else rows, name)

    return write
