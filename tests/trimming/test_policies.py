"""Policies on a running model: what they are shown, and that each of them can decide."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

import crosstrim
from crosstrim.errors import InputError
from crosstrim.method import policies
from crosstrim.method.policies import POLICIES, Evidence
from tests.support import tiny
from tests.support.tiny import Image


@dataclass(frozen=True, eq=False)
class Spy:
    """Remembers its evidence and likes nothing in particular."""

    seen: list[Evidence] = field(default_factory=list)

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        self.seen.append(evidence)
        return torch.zeros_like(evidence.saliency)


@pytest.fixture
def inputs():
    return tiny.inputs([3, Image(2, seed=1), 6], [Image(4, seed=2), 4])


def test_evidence_has_the_keys_and_values_that_the_layer_caches(model, inputs):
    spy = Spy()
    with crosstrim.trim(model, keep=1.0, policy=spy, trim_first_layer=False), torch.no_grad():
        cache = model(**inputs).past_key_values
    (evidence,) = spy.seen
    leader = cache.layers[tiny.CROSS_LAYERS[0]]
    torch.testing.assert_close(evidence.keys, leader.keys)
    torch.testing.assert_close(evidence.values, leader.values)
    assert evidence.visible.sum(1).tolist() == [2 * tiny.FEATURES_PER_TILE, 4 * tiny.FEATURES_PER_TILE]
    assert (evidence.features_per_image, evidence.features_per_tile) == (68, 17)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_keeps_its_budget_in_a_batch(model, inputs, policy):
    with crosstrim.trim(model, keep=9, policy=policy) as trimmed:
        model.generate(**inputs, max_new_tokens=2)
        assert [images[0].kept for images in trimmed.report().samples] == [9, 9]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("knob", [{"keep": 0.2}, {"keep": 9}, {"k": 0.1}], ids=str)
def test_the_callers_default_dtype_and_device_decide_nothing(model, inputs, policy, knob):
    def kept():
        with crosstrim.trim(model, policy=policy, **knob) as trimmed, torch.no_grad():
            cache = model(**inputs).past_key_values
        return [images[0].kept_indices for images in trimmed.report(cache).samples]

    expected = kept()
    try:
        for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
            torch.set_default_dtype(dtype)
            policies._even_order.cache_clear()
            with torch.device(device):
                assert kept() == expected, (dtype, device)
    finally:
        torch.set_default_dtype(torch.float32)
        policies._even_order.cache_clear()


@dataclass(frozen=True)
class Everything:
    """Chooses more than is there to be seen."""

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        return evidence.saliency

    def chosen(self, evidence: Evidence) -> torch.Tensor:
        return torch.ones_like(evidence.visible)


def test_a_policys_own_choice_is_cut_to_what_is_visible(model, inputs):
    with crosstrim.trim(model, policy=Everything()) as trimmed:
        model.generate(**inputs, max_new_tokens=2)
        report = trimmed.report()
    assert [images[0].kept for images in report.samples] == [2 * 17, 4 * 17]
    assert report.kept_fraction == 1


@pytest.mark.parametrize("returned", [None, torch.zeros(2, 5)], ids=["None", "shape"])
def test_votes_that_are_none_are_refused_in_words(model, inputs, returned):
    with (
        crosstrim.trim(model, keep=5, policy=lambda evidence: returned),
        pytest.raises(InputError, match=r"test_policies.*<lambda> returned .*, but votes must be a tensor"),
    ):
        model.generate(**inputs, max_new_tokens=2)
