"""Pictures unlike mini's training: each group departs in its own way, and any seed can be drawn again."""

from __future__ import annotations

import numpy as np
import pytest
from recipes import unseen
from recipes.mini.pictures import FEWEST, MOST, PLACES
from recipes.mini.settings import TILE


def drawn(group, layout=(1, 2), seed=0):
    return unseen.scene(unseen.GROUPS[group], layout, np.random.default_rng(seed))


@pytest.mark.parametrize("group", unseen.GROUPS)
def test_a_seed_draws_one_picture_of_different_digits(group):
    one, again = drawn(group), drawn(group)
    assert np.array_equal(one.pixels, again.pixels)
    assert one.digits == again.digits
    assert one.pixels.shape == (TILE, 2 * TILE, 3)
    assert not np.array_equal(one.pixels, drawn(group, seed=1).pixels)
    for field in ("value", "colour"):
        assert len({getattr(digit, field) for digit in one.digits}) == len(one.digits)


@pytest.mark.parametrize("group", unseen.GROUPS)
def test_how_many_and_where(group):
    for seed in range(8):
        digits = drawn(group, seed=seed).digits
        least, most = (6, 7) if unseen.GROUPS[group].many else (FEWEST, MOST)
        assert least <= len(digits) <= most
        places = [PLACES.index(digit.place) for digit in digits]
        assert places == sorted(places)
        for digit, place in zip(digits, places, strict=True):
            assert place == int(digit.centre[1] * 3 // TILE) * 3 + int(digit.centre[0] * 3 // (2 * TILE))
        if not unseen.GROUPS[group].anywhere:
            assert len(set(places)) == len(places)


def test_the_questions_name_their_group(tmp_path, monkeypatch):
    monkeypatch.setattr(unseen, "PICTURES", 1)
    lines = unseen.write(tmp_path).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 8 * len(unseen.GROUPS)
    assert len(list((tmp_path / "images").iterdir())) == len(unseen.GROUPS)
