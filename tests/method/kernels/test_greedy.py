"""Greedy choices in torch, against loops: ties, rows that have no more to take, and likely ones ahead."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosstrim.errors import ConfigError
from crosstrim.method.kernels import greedy, greedy_torch
from tests.support.kernels import greedy_case, taken_by_loops


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 30), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_one_image_at_a_time_all_at_once_and_loops_take_the_same(seed, size, steps, weight):
    gain, unit = greedy_case(seed, images=3, size=size)
    expected = taken_by_loops(gain, unit, weight, steps)
    assert torch.equal(greedy_torch.marginal_relevance(gain, unit, weight, steps), expected)
    assert torch.equal(greedy_torch._least_alike_of_all(gain, unit, weight, steps), expected)


@pytest.mark.parametrize("ahead", [1, 3, 64])
def test_how_many_are_computed_ahead_changes_nothing(ahead, monkeypatch):
    monkeypatch.setattr(greedy_torch, "AHEAD", ahead)
    gain, unit = greedy_case(1, images=2, size=50)
    assert torch.equal(greedy_torch.marginal_relevance(gain, unit, 0.5, 40), taken_by_loops(gain, unit, 0.5, 40))


def test_equals_go_to_the_lowest_index_though_more_of_them_than_are_computed_ahead():
    gain, unit = torch.ones(1, 200), torch.eye(200).unsqueeze(0)
    assert greedy_torch.marginal_relevance(gain, unit, 0.5, 200)[0].tolist() == list(range(200))


def test_a_budget_of_half_a_large_image_is_taken_by_the_rule_to_its_end():
    gain, unit = greedy_case(2, images=1, size=1601)
    taken = greedy_torch.marginal_relevance(gain, unit, 0.5, 1300)
    assert torch.equal(taken, greedy_torch._least_alike_of_all(gain, unit, 0.5, 1300))
    assert len(set(taken[0].tolist())) == 1300


@pytest.mark.parametrize(
    "rule", [greedy.marginal_relevance, lambda *inputs: greedy.determinantal(inputs[0], *inputs)]
)
def test_the_variable_that_picks_kernels_is_read_here_too(rule, monkeypatch):
    gain, unit = greedy_case(3, images=1, size=9)
    monkeypatch.setenv("CROSSTRIM_KERNEL", "fast")
    with pytest.raises(ConfigError, match="'fast'"):
        rule(gain.clamp_min(0.1), unit, 0.5, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.1, 0.3, 1.0]))
def test_least_explained_of_one_image_at_a_time_and_of_all_at_once_are_the_same(seed, size, steps, width):
    generator = torch.Generator().manual_seed(seed)
    quality = torch.rand(2, size, generator=generator) + 0.1
    unit = torch.nn.functional.normalize(torch.randn(2, size, 16, generator=generator), dim=-1)
    variance = quality.square()
    variance[1, size // 2 + 1 :] = -torch.inf
    inputs = (quality, variance, unit, width, min(steps, size // 2 + 1))
    expected = greedy_torch._least_explained_of_all(*inputs)
    for ahead in (1, 3, 128):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(greedy_torch, "AHEAD", ahead)
            assert torch.equal(greedy_torch.determinantal(*inputs), expected)


def test_a_row_that_has_no_more_to_take_repeats_its_first_place_and_equals_come_in_order():
    quality = torch.ones(2, 200)
    variance = quality.square()
    variance[1, 2:] = -torch.inf
    taken = greedy_torch.determinantal(quality, variance, torch.eye(200).expand(2, -1, -1), 0.01, 150)
    assert taken[0].tolist() == list(range(150))
    assert taken[1].tolist() == [0, 1] + [0] * 148
