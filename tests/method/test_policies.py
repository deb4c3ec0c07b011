"""Policies against brute force, and what all of them promise."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosstrim import select
from crosstrim.errors import ConfigError, InputError
from crosstrim.method import greedy, policies
from crosstrim.method.policies import Evidence
from tests.support.evidence import IMAGE, evidence

NAMES = sorted(policies.POLICIES)


def sample_of(one, index):
    parts = {
        name: getattr(one, name)[index : index + 1] for name in ("saliency", "visible", "keys", "values", "budget")
    }
    return Evidence(**parts, features_per_image=one.features_per_image, features_per_tile=one.features_per_tile)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", [1, 2])
def test_votes_obey_budgets_and_repeat(name, images):
    one = evidence(images=images)
    policy = policies.resolve(name)
    votes = policy(one)
    assert votes.shape[0] == 2
    assert votes.shape[2] == images * IMAGE
    assert torch.equal(votes, policies.resolve(name)(one))
    kept = select(votes, one.visible, keep=6, features_per_image=IMAGE)
    seen = one.visible.unflatten(1, (-1, IMAGE)).sum(-1)
    assert torch.equal(kept.unflatten(1, (-1, IMAGE)).sum(-1), seen.clamp(max=6))
    assert not (kept & ~one.visible).any()


@pytest.mark.parametrize("name", [*NAMES, "mmr:0", "mmr:1", "contribution:0"])
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    one = evidence(batch=3)
    one.budget[:] = torch.tensor([[2], [6], [9]])  # and so pools of different sizes
    together = policies.resolve(name)(one)
    for index in range(3):
        assert torch.equal(policies.resolve(name)(sample_of(one, index)), together[index : index + 1])


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_everything_keeps_everything(name):
    one = evidence(budget=IMAGE)
    assert torch.equal(select(policies.resolve(name)(one), one.visible, keep=1.0), one.visible)


def pool_of(one, sample):
    """The brute-force references' view: relevance in [0, 1] and cosines over the features that may be chosen."""
    seen = one.visible[sample].nonzero().flatten().tolist()
    relevance = one.saliency[sample].double().mean(0)
    budget = min(int(one.budget[sample, 0]), len(seen))
    ranked = sorted(seen, key=lambda n: (-relevance[n].item(), n))[: greedy.POOL * budget]
    keys = one.keys[sample].double()
    unit = keys / keys.norm(dim=-1, keepdim=True)
    cosine = torch.einsum("hnd,hmd->nm", unit, unit) / len(unit)
    return sorted(ranked), relevance / relevance[seen].max(), cosine, budget


def mmr_by_loops(one, sample, balance):
    pool, relevance, cosine, budget = pool_of(one, sample)
    taken = []
    while len(taken) < budget:
        left = [n for n in pool if n not in taken]
        redundancy = {n: max((cosine[n, m].item() for m in taken), default=-1.0) for n in left}
        taken.append(max(left, key=lambda n: balance * relevance[n].item() - (1 - balance) * redundancy[n]))
    return taken


def dpp_by_determinants(one, sample, width):
    pool, relevance, cosine, budget = pool_of(one, sample)
    quality = relevance.clamp_min(1e-6)
    kernel = torch.exp((cosine - 1) / width) * quality[:, None] * quality[None]
    taken = []
    while len(taken) < budget:
        left = [n for n in pool if n not in taken]
        taken.append(max(left, key=lambda n: torch.linalg.det(kernel[[*taken, n]][:, [*taken, n]]).item()))
    return taken


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
def test_mmr_equals_brute_force(seed, budget, balance):
    one = evidence(seed, budget=budget)
    votes = policies.MaximalMarginalRelevance(balance)(one)
    for sample in range(2):
        expected = mmr_by_loops(one, sample, balance)
        assert votes[sample, 0].argsort(descending=True)[: len(expected)].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([0.2, 0.5]))
def test_dpp_equals_brute_force(seed, budget, width):
    one = evidence(seed, budget=budget)
    votes = policies.DeterminantalPointProcess(width)(one)
    for sample in range(2):
        expected = dpp_by_determinants(one, sample, width)
        assert votes[sample, 0].argsort(descending=True)[: len(expected)].tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_contribution_is_mmr_of_attention_times_value(seed, budget):
    one = evidence(seed, budget=budget)
    votes = policies.Contribution()(one)
    added = torch.zeros_like(one.saliency)
    for sample, head, feature in product(range(2), range(4), range(IMAGE)):
        value = one.values[sample, head // 2, feature]
        added[sample, head, feature] = (one.saliency[sample, head, feature] * value).norm()
    for sample in range(2):
        expected = mmr_by_loops(replace(one, saliency=added, keys=one.values), sample, 0.5)
        assert votes[sample, 0].argsort(descending=True)[: len(expected)].tolist() == expected


@contextlib.contextmanager
def defaults(dtype, device):
    """torch's defaults as a caller may have set them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_callers_default_dtype_and_device_decide_nothing(name, dtype):
    one = evidence(image=1570, tile=785, images=2, size=64, budget=200)  # large enough that keys are projected
    knobs = {"k": 0.1}, {"keep": 0.1}, {"keep": 90}
    expected = policies.resolve(name)(one)
    policies._even_order.cache_clear()
    with defaults(dtype, "meta"):
        votes = policies.resolve(name)(one)
        kept = [select(votes, one.visible, features_per_image=1570, **knob) for knob in knobs]
    policies._even_order.cache_clear()
    assert (votes.dtype, votes.device) == (torch.float32, expected.device)
    assert torch.equal(votes, expected)
    for found, knob in zip(kept, knobs, strict=True):
        assert torch.equal(found, select(expected, one.visible, features_per_image=1570, **knob))


def references(one):
    return mmr_by_loops(one, 0, 0.5), dpp_by_determinants(one, 0, 0.3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=4, max_size=4), st.sampled_from([1, 3000, 2**28]))
def test_images_with_budgets_of_their_own_are_chosen_from_as_if_alone(seed, budgets, chunk_bytes):
    """Two samples of two images, each with its own budget and its own number of visible features."""
    one = evidence(seed, images=2)
    one.visible[0, 3:IMAGE] = False
    one = replace(one, budget=torch.tensor(budgets).view(2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "CHUNK_BYTES", chunk_bytes)
        votes = policies.MaximalMarginalRelevance()(one), policies.DeterminantalPointProcess()(one)
    for sample in range(2):
        for image in range(2):
            span = slice(image * IMAGE, (image + 1) * IMAGE)
            alone = replace(
                one,
                **{name: getattr(one, name)[sample : sample + 1, ..., span] for name in ("saliency", "visible")},
                **{name: getattr(one, name)[sample : sample + 1, :, span] for name in ("keys", "values")},
                budget=one.budget[sample : sample + 1, image : image + 1],
            )
            for together, expected in zip(votes, references(alone), strict=True):
                got = together[sample, 0, span].argsort(descending=True, stable=True)[: len(expected)]
                assert got.tolist() == expected


def test_diversity_alone_is_among_the_visible():
    """A pool that is larger than what is visible ends before the others' does."""
    one = evidence(batch=2, budget=9)
    one.visible[0, 12:] = False
    kept = policies.MaximalMarginalRelevance(0.0)(one)[0, 0].argsort(descending=True)[:9].tolist()
    assert kept == mmr_by_loops(one, 0, 0.0)


def test_diversity_leaves_out_twins():
    """Two features with the same key: the greedy policies take one of them, the plain ranking both."""
    one = evidence(batch=1, budget=2)
    one.visible[:] = True
    one.saliency[:] = 0.01
    one.saliency[..., 3], one.saliency[..., 4], one.saliency[..., 20] = 1.0, 0.99, 0.8
    one.keys[:, :, 4] = one.keys[:, :, 3]
    for name, chosen in {"mean": [3, 4], "mmr": [3, 20], "dpp": [3, 20]}.items():
        kept = select(policies.resolve(name)(one), one.visible, keep=2)
        assert kept[0].nonzero().flatten().tolist() == chosen, name


def test_sketching_keeps_cosines_roughly():
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(8, 50, 128, generator=generator)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    exact = torch.einsum("hnd,hmd->nm", unit, unit) / 8
    sketch = greedy.sketch(keys.unsqueeze(0), torch.arange(50).unsqueeze(0))[0]
    assert sketch.shape == (50, greedy.SKETCH)
    assert (sketch @ sketch.T - exact).abs().mean() < 0.15


def test_value_weighs_by_the_groups_value_norm():
    one = evidence()
    norms = one.values.norm(dim=-1)
    for head in range(4):
        expected = one.saliency[:, head] * norms[:, head // 2]
        torch.testing.assert_close(policies.Value()(one)[:, head], expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_mass_is_the_fewest_features_per_head(seed, share):
    one = evidence(seed, images=2)
    kept = policies.Mass(share).chosen(one)
    for sample in range(2):
        for start in (0, IMAGE):
            expected = set()
            for head in range(4):
                seen = [n for n in range(start, start + IMAGE) if one.visible[sample, n]]
                order = sorted(seen, key=lambda n: -one.saliency[sample, head, n].item())
                weights = [one.saliency[sample, head, n].item() for n in order]
                total = math.fsum(weights)
                taken = next(
                    count
                    for count in range(1, len(order) + 1)
                    if math.fsum(weights[:count]) >= (share - 1e-6) * total
                )
                expected |= set(order[:taken])
            got = set((kept[sample, start : start + IMAGE].nonzero().flatten() + start).tolist())
            assert expected <= got
            assert len(got) <= len(expected) + 4  # where a sum lands on the share within rounding


def test_grid_is_even_at_any_length():
    order = policies._even_order(1600).reshape(40, 40)
    for count in (100, 320, 800):
        taken = order < count
        quarters = taken.unflatten(0, (4, 10)).unflatten(2, (4, 10)).sum((1, 3))
        assert quarters.min() >= count / 16 * 0.7
        assert quarters.max() <= count / 16 * 1.3


def test_names_take_numbers():
    assert policies.resolve("mass:0.8") == policies.Mass(0.8)
    assert policies.resolve("random:7") == policies.Random(7)
    assert policies.resolve("mmr:0.3") == policies.MaximalMarginalRelevance(0.3)
    for name, wording in {
        "random:nan": "seed=nan must be a whole number from 0",
        "random:2.5": "seed=2.5 must be",
        "random:-1": "seed=-1.0 must be",
        "random:1e30": r"seed=1e\+30 must be",
        "mass:2": "policy='mass:2': p=2.0 must be a share",
        "mass:x": "policy='mass:x': 'x' is no number; leave out ':x' or give one",
        "random:": "policy='random:': '' is no number",
        "union:3": "policy='union:3': 'union' takes no number; leave out ':3'",
        "union:x": "'union' takes no number",
        "grdi": "Did you mean 'grid'",
        "__main__.mine": "One of your own is given as the callable",
    }.items():
        with pytest.raises(ConfigError, match=wording):
            policies.resolve(name)


def test_any_callable_is_a_policy():
    def last(one):
        return torch.arange(one.visible.shape[1]).float().expand(len(one.visible), 1, -1)

    assert policies.resolve(last) is last


def mine(one):
    return one.saliency


@dataclass(frozen=True)
class Mine:
    weight: float = 0.5

    def __call__(self, one):
        return one.saliency


def test_a_policy_has_a_name_that_holds_no_address():
    assert policies.name_of("mass:0.9") == "mass:0.9"
    assert policies.name_of(mine) == "tests.method.test_policies.mine"
    assert policies.name_of(Mine(0.25)) == "Mine(weight=0.25)"
    assert policies.name_of(functools.partial(mine)) == "functools.partial"
    assert policies.name_of(policies.Mean) == "crosstrim.method.policies.Mean"


@pytest.mark.parametrize(
    ("returned", "met"),
    [
        (None, "None"),
        (torch.zeros(2, IMAGE), r"torch.float32 \[2, 34\]"),
        (torch.zeros(2, 1, 5), r"torch.float32 \[2, 1, 5\]"),
        (torch.zeros(2, 0, IMAGE), r"torch.float32 \[2, 0, 34\]"),
    ],
)
def test_votes_of_a_wrong_shape_are_refused_by_the_policys_name(returned, met):
    def wrong(one):
        return returned

    words = rf"policy tests.method.test_policies.*wrong returned {met}, but votes must be a tensor \[2, .*, 34\]"
    with pytest.raises(InputError, match=words):
        policies.votes_of(wrong, evidence())


def test_a_choice_is_among_the_visible_and_fits():
    class Own:
        chooses = torch.ones(2, IMAGE, dtype=torch.bool)

        def chosen(self, one):
            return self.chooses

    one, own = evidence(), Own()
    assert torch.equal(policies.chosen_by(own, one), one.visible)
    for wrong in (None, torch.ones(2, IMAGE), torch.ones(2, 5, dtype=torch.bool)):
        own.chooses = wrong
        with pytest.raises(InputError, match=r"Own returned .*, but what is chosen must be a bool tensor \[2, 34\]"):
            policies.chosen_by(own, one)


def test_a_pyramid_decides_alone_where_the_policy_within_does():
    one = evidence()
    pyramid = policies.Pyramid(0.5, policies.Mass(0.9))
    assert torch.equal(policies.chosen_by(pyramid, one), policies.Mass(0.9).chosen(one))
    assert not policies.Pyramid(0.5).decides_alone


def test_random_votes_do_not_depend_on_batch_or_length():
    short, long = evidence(), evidence(batch=1, image=3400)
    votes = policies.Random(3)(short)
    assert torch.equal(votes[0], votes[1])
    assert torch.equal(votes[0], policies.Random(3)(long)[0, :, :IMAGE])
    assert not torch.equal(votes, policies.Random(4)(short))
