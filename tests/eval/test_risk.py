"""Exact tails against fractions, and the promise itself on simulated data."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosstrim.errors import ConfigError
from crosstrim.eval import risk


def brute(changed, count, chance):
    """The tail in exact arithmetic; `chance` is the float itself as a fraction."""
    part, whole = chance.as_integer_ratio()
    ways = (comb(count, one) * part**one * (whole - part) ** (count - one) for one in range(changed + 1))
    return float(Fraction(sum(ways), whole**count))


@pytest.mark.parametrize("count", [1, 2, 7, 59, 150, 600])
@pytest.mark.parametrize("chance", [1e-6, 0.01, 0.02, 0.05, 0.3, 0.5, 0.97])
def test_tails_agree_with_fractions(count, chance):
    for changed in {0, 1, count // 50, count // 3, count - 1} & set(range(count)):
        assert risk.tail(changed, count, chance) == pytest.approx(brute(changed, count, chance), rel=1e-12, abs=0)


def test_tails_of_many_draws_neither_underflow_nor_drift():
    assert risk.tail(50_000, 100_000, 0.5) == pytest.approx(0.5 + comb(100_000, 50_000) / 2 ** (100_001), rel=1e-10)
    assert risk.tail(0, 100_000, 1e-4) == pytest.approx(np.exp(100_000 * np.log1p(-1e-4)), rel=1e-10)


def test_tails_at_the_edges():
    assert (risk.tail(-1, 5, 0.5), risk.tail(5, 5, 0.5), risk.tail(9, 5, 0.5)) == (0, 1, 1)
    assert (risk.tail(0, 5, 0.0), risk.tail(4, 5, 1.0)) == (1, 0)


@settings(deadline=None)
@given(st.integers(1, 400), st.data(), st.floats(0.001, 0.2))
def test_the_upper_bound_is_the_test_turned_round(count, data, error):
    changed = data.draw(st.integers(0, count - 1))
    bound = risk.upper(changed, count, error)
    assert risk.tail(changed, count, bound) <= error
    assert risk.tail(changed, count, bound * (1 - 1e-9)) > error


@pytest.mark.parametrize(
    ("changed", "count", "low", "high"),
    # Where there is a closed form: none or all changed.
    [(0, 100, 0, 1 - 0.025 ** (1 / 100)), (100, 100, 0.025 ** (1 / 100), 1)],
)
def test_intervals_in_closed_form(changed, count, low, high):
    assert risk.interval(changed, changed, count, 0.95) == pytest.approx((low, high), abs=1e-12)


def test_an_interval_covers_as_often_as_it_says():
    for chance in (0.003, 0.02, 0.4):
        inside = [low <= chance <= high for low, high in (risk.interval(c, c, 80, 0.9) for c in range(81))]
        chances = [comb(80, c) * chance**c * (1 - chance) ** (80 - c) for c in range(81)]
        assert sum(np.array(chances) * inside) >= 0.9


def test_what_was_not_looked_at_widens_an_interval():
    low, high = risk.interval(3, 3, 100, 0.95)
    assert risk.interval(3, 20, 100, 0.95) == (low, risk.interval(20, 20, 100, 0.95)[1])
    assert high < risk.interval(3, 20, 100, 0.95)[1]


@pytest.mark.parametrize(
    ("level", "changed", "count"), [(0.05, 0, 59), (0.02, 0, 149), (0.01, 0, 299), (0.05, 1, 93), (0.02, 1, 236)]
)
def test_how_many_draws_a_claim_needs(level, changed, count):
    assert risk.needed(level, 0.95, changed) == count
    assert brute(changed, count, level) <= 0.05 < brute(changed, count - 1, level)
    assert risk.allowed(count, level, 0.95) == changed
    assert risk.allowed(count - 1, level, 0.95) == changed - 1


def test_a_risk_near_zero_needs_more_draws_than_there_is_memory_for():
    count = risk.needed(1e-12, 0.95)
    assert count == pytest.approx(np.log(0.05) / np.log1p(-1e-12), rel=1e-9)


def test_how_many_draws_a_rate_needs():
    assert risk.needed_at(0.05, 0.05, 0.95) is None
    assert risk.needed_at(0.0, 0.05, 0.95) == 59
    assert risk.needed_at(0.04999, 0.05, 0.95) is None  # millions
    count = risk.needed_at(0.01, 0.02, 0.95)
    assert int(np.ceil(0.01 * count)) <= risk.allowed(count, 0.02, 0.95)


def test_the_sequence_ends_at_the_first_test_that_is_lost():
    assert risk.allowed(300, 0.05, 0.95) == 8
    assert risk.certified([0, 3, 8], 300, 0.05, 0.95) == 3
    assert risk.certified([0, 9, 2], 300, 0.05, 0.95) == 1  # a smaller budget that looks better comes too late
    assert risk.certified([9, 0, 0], 300, 0.05, 0.95) == 0
    assert risk.certified([0, 0], 58, 0.05, 0.95) == 0


@settings(deadline=None, max_examples=25)
@given(
    st.integers(20, 700),
    st.sampled_from([0.01, 0.02, 0.05, 0.2]),
    st.sampled_from([0.8, 0.95]),
    st.lists(st.floats(0.2, 4), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_the_promise_holds_on_simulated_data(count, level, confidence, factors, seed):
    """Budgets of known risk, in any order: one that is above the level is certified no oftener than promised."""
    risks = np.minimum(level * np.array(factors), 1)
    draws = 2000
    changes = np.random.default_rng(seed).binomial(count, risks, (draws, len(risks)))
    most = risk.allowed(count, level, confidence)
    passed = np.cumprod(changes <= most, axis=1).astype(bool)
    assert (passed.sum(1)[:50] == [risk.certified(row, count, level, confidence) for row in changes[:50]]).all()
    broken = (passed & (risks > level)).any(1).mean()
    error = 1 - confidence
    assert broken <= error + 4 * (error * confidence / draws) ** 0.5


@pytest.mark.parametrize("levels", [(0, 0.95), (1, 0.95), (0.02, 0), (0.02, 1), (-0.1, 0.9), (float("nan"), 0.9)])
def test_levels_are_checked(levels):
    with pytest.raises(ConfigError, match="must lie between 0 and 1"):
        risk.check_levels(*levels)
