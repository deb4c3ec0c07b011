from __future__ import annotations

import pytest

from crosstrim.wording import counted, rounded


@pytest.mark.parametrize(("number", "words"), [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens")])
def test_one_is_not_many(number, words):
    assert counted(number, "token") == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(11450.2, "11450"), (9999.7, "10000"), (1234.4, "1234"), (-2e5, "-200000"), (1.5, "1.5"), (0.0, "0")],
)
def test_large_numbers_are_written_out(number, words):
    assert rounded(number, 4) == words
