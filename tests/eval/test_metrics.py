"""Right answers, divergence and bands, against arithmetic done by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from crosstrim.eval import metrics


@pytest.mark.parametrize("text", ["4", " 4 ", "4.", "FOUR", "four ."])
def test_right(text):
    assert metrics.is_right(text, ["4", "Four"])


@pytest.mark.parametrize("text", ["", ".", "44", "4 4", "it is 4", "-4"])
def test_wrong(text):
    assert not metrics.is_right(text, ["4", "Four"])


def test_divergence_by_hand():
    untrimmed, trimmed = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    expected = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    (found,) = metrics.divergence(untrimmed + 7, trimmed - 3)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_divergence_of_equals_is_nothing():
    logits = torch.randn(3, 50) * 20
    assert metrics.divergence(logits, logits).tolist() == [0, 0, 0]


def test_divergence_with_tokens_that_are_ruled_out():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    assert metrics.divergence(logits, logits).tolist() == [0]
    assert metrics.divergence(logits, torch.zeros(1, 3)).item() == pytest.approx(math.log(1.5))


def test_bootstrap_against_all_resamples_there_are():
    values = [0.0, 1.0, 3.0, 10.0]
    means = [sum(one) / 4 for one in itertools.product(values, repeat=4)]  # each of them equally likely
    low, high = np.percentile(means, [2.5, 97.5])
    (found,) = metrics.bootstrap(np.array(values)[:, None], resamples=50_000)
    assert found.mean == 3.5
    assert (found.low, found.high) == (pytest.approx(low, abs=0.26), pytest.approx(high, abs=0.26))


def test_bootstrap_by_hand():
    values = np.random.default_rng(1).random((30, 2))
    generator = np.random.default_rng(0)
    means = np.array([generator.multinomial(30, [1 / 30] * 30) @ values / 30 for _ in range(metrics.RESAMPLES)])
    for column, found in enumerate(metrics.bootstrap(values)):
        assert found.mean == pytest.approx(values[:, column].mean())
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means[:, column], [2.5, 97.5])))


def test_bootstrap_is_the_same_every_time_and_paired():
    values = np.random.default_rng(1).random(40)
    one, other = metrics.bootstrap(np.stack([values, values], axis=1))
    (alone,) = metrics.bootstrap(values[:, None])
    for estimate in (other, alone):
        assert (estimate.low, estimate.high) == pytest.approx((one.low, one.high), rel=1e-12)


def test_bootstrap_of_equal_values_has_no_width():
    (found,) = metrics.bootstrap(np.ones((5, 1)))
    assert found == metrics.Estimate(1, 1, 1)
