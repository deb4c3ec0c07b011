"""Selection against a loop-based reference, and the properties the docs promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosstrim import select
from crosstrim.errors import InputError
from crosstrim.method.selection import budget_of
from tests.support.oracle import kept_by_loops

SHARES = st.sampled_from([0.01, 0.05, 0.07, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])


@st.composite
def cases(draw, most_images=3):
    batch, voters = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    image_count, per_image = draw(st.integers(1, most_images)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = image_count * per_image
    # Few distinct values, so that ties are common.
    levels = draw(st.sampled_from([2, 4, 1000]))
    votes = torch.randint(0, levels, (batch, voters, count), generator=generator) / levels
    if draw(st.booleans()):
        votes = votes.masked_fill(votes < 0.5, float("-inf"))
    visible = torch.rand(batch, count, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return votes, visible, per_image


knobs = st.one_of(
    st.builds(dict, k=SHARES, k_base=st.sampled_from(["visible", "all"])),
    st.builds(dict, keep=SHARES),
    st.builds(dict, keep=st.integers(1, 15)),
    st.just({}),
)


@settings(max_examples=300, deadline=None)
@given(cases(), knobs)
def test_equals_the_loops(case, knob):
    votes, visible, size = case
    kept = select(votes, visible, features_per_image=size, **knob)
    assert torch.equal(kept, kept_by_loops(votes, visible, size=size, **knob))


@settings(deadline=None)
@given(cases(), SHARES, SHARES)
def test_nested_in_k_and_in_keep(case, one, other):
    votes, visible, size = case
    small, large = sorted([one, other])
    for knob in ("k", "keep"):
        fewer = select(votes, visible, features_per_image=size, **{knob: small})
        more = select(votes, visible, features_per_image=size, **{knob: large})
        assert not (fewer & ~more).any()


@settings(deadline=None)
@given(cases(), knobs)
def test_never_keeps_an_invisible_feature(case, knob):
    votes, visible, size = case
    votes = votes.masked_fill(~visible.unsqueeze(1), 1e9)  # however loudly it is voted for
    assert not (select(votes, visible, features_per_image=size, **knob) & ~visible).any()


@settings(deadline=None)
@given(cases(), st.one_of(SHARES, st.integers(1, 15)))
def test_keep_is_exact(case, keep):
    votes, visible, size = case
    kept = select(votes, visible, features_per_image=size, keep=keep).unflatten(1, (-1, size)).sum(-1)
    seen = visible.unflatten(1, (-1, size)).sum(-1)
    exact = seen.clamp(max=keep) if isinstance(keep, int) else (seen.double() * keep - 1e-9).ceil().long()
    assert torch.equal(kept, exact)


@settings(deadline=None)
@given(cases(most_images=1), knobs, st.integers(0, 2**31))
def test_follows_a_permutation_of_the_features(case, knob, seed):
    votes, visible, _ = case
    # All votes distinct: ties go by index, which a permutation changes.
    votes = votes.nan_to_num(neginf=0.0) + torch.rand(votes.shape, generator=torch.Generator().manual_seed(seed)).mul(
        1e-3
    )
    order = torch.randperm(votes.shape[-1], generator=torch.Generator().manual_seed(seed))
    kept = select(votes, visible, **knob)
    assert torch.equal(select(votes[..., order], visible[:, order], **knob), kept[:, order])


@settings(deadline=None)
@given(cases(), knobs)
def test_a_sample_does_not_depend_on_its_batch_mates(case, knob):
    votes, visible, size = case
    together = select(votes, visible, features_per_image=size, **knob)
    alone = [select(votes[i : i + 1], visible[i : i + 1], features_per_image=size, **knob) for i in range(len(votes))]
    assert torch.equal(together, torch.cat(alone))


def test_every_voter_gets_its_favourites():
    votes = torch.tensor([[[9.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 9]]])
    kept = select(votes, torch.ones(1, 8, dtype=torch.bool), k=0.125)
    assert kept[0].nonzero().flatten().tolist() == [0, 7]


@pytest.mark.parametrize("nothing", [float("-inf"), float("nan")])
def test_a_budget_is_kept_where_nothing_was_voted_for(nothing):
    visible = torch.arange(10).unsqueeze(0) >= 5
    votes = torch.full((1, 2, 10), nothing)
    assert select(votes, visible, keep=3)[0].nonzero().flatten().tolist() == [5, 6, 7]
    assert select(votes, visible, k=0.4)[0].nonzero().flatten().tolist() == [5, 6]
    votes[0, 1, 8] = -1e30
    assert select(votes, visible, keep=2)[0].nonzero().flatten().tolist() == [5, 8], "a vote is above no vote"


def test_the_smallest_share_is_one_feature():
    votes, visible = torch.rand(2, 1, 100), torch.ones(2, 100, dtype=torch.bool)
    visible[1] = False
    for knob in ({"k": 4e-10}, {"keep": 4e-10}, {"k": 5e-324}):
        assert select(votes, visible, **knob).sum(1).tolist() == [1, 0]


def test_more_than_there_is_is_everything():
    votes, visible = torch.rand(1, 1, 9), torch.ones(1, 9, dtype=torch.bool)
    assert select(votes, visible, keep=10**20).all()


@settings(deadline=None)
@given(cases(), knobs)
def test_no_budget_is_larger_than_what_is_visible(case, knob):
    _, visible, size = case
    visible = visible.unflatten(1, (-1, size))
    assert (budget_of(visible, **knob) <= visible.sum(-1)).all()


def test_numpys_numbers_are_numbers():
    votes, visible = torch.rand(1, 1, 100), torch.ones(1, 100, dtype=torch.bool)
    for knob, count in (
        *(({"k": np.float32(0.25)}, 25), ({"keep": np.float32(0.1)}, 10), ({"keep": np.int64(5)}, 5)),
        ({"k": np.float64(0.07)}, 7),
    ):
        assert select(votes, visible, **knob).sum() == count


def test_shares_are_decimal():
    votes, visible = torch.rand(1, 1, 100), torch.ones(1, 100, dtype=torch.bool)
    assert select(votes, visible, k=0.07).sum() == 7  # 0.07 * 100 is 7.000000000000001 in binary
    assert select(votes, visible, keep=0.29).sum() == 29  # and 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize(
    ("arguments", "wording"),
    [
        ({"votes": torch.rand(2, 3)}, r"\[B, V, N\].*\(2, 3\)"),
        ({"visible": torch.ones(1, 4)}, "float32"),
        ({"visible": torch.ones(1, 5, dtype=torch.bool)}, r"\(1, 5\)"),
        ({"votes": torch.rand(1, 0, 4)}, r"\(1, 0, 4\) have no voter; V must be at least 1"),
        ({"k": 0.5, "keep": 0.5}, "give one of them"),
        ({"k": 9}, "k=9 must be a share above 0 and at most 1, such as k=0.25"),
        ({"k": 0}, "k=0 must be"),
        ({"k": -1}, "k=-1 must be"),
        ({"k": True}, "k=True must be"),
        ({"k": "x"}, "k='x' must be"),
        ({"k": float("nan")}, "k=nan must be"),
        ({"keep": 7.5}, "keep=7.5 must be a share .* or a whole number"),
        ({"keep": 0}, "keep=0 as a count must be at least 1"),
        ({"keep": -3}, "keep=-3 as a count"),
        ({"keep": float("inf")}, "keep=inf must be"),
        ({"keep": np.int64(0)}, "as a count must be at least 1"),
        ({"k": 0.5, "k_base": "zzz"}, "k_base='zzz' must be one of 'visible', 'all'"),
        ({"k": 0.5, "features_per_image": 3}, "does not divide the 4 features"),
    ],
)
def test_errors_name_what_they_met(arguments, wording):
    good = {"votes": torch.rand(1, 2, 4), "visible": torch.ones(1, 4, dtype=torch.bool)}
    with pytest.raises(InputError, match=wording):
        select(**good | arguments)


@pytest.mark.parametrize(
    "votes",
    [
        torch.tensor([1.0 + 1e-12, 1.0, 1.0 + 2e-12, 0.5], dtype=torch.float64),
        torch.tensor([2**60 + 1, 2**60, 2**60 + 2, -(2**62)]),
        torch.tensor([200, 3, 255, 1], dtype=torch.uint8),
        torch.tensor([2.0, 1.0, 3.0, float("-inf")], dtype=torch.bfloat16),
        torch.tensor([1e300, -1e300, float("inf"), float("nan")], dtype=torch.float64),
    ],
    ids=["float64", "int64", "uint8", "bfloat16", "beyond float32"],
)
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_votes_are_ranked_as_given(votes, keep):
    kept = select(votes.view(1, 1, 4), torch.ones(1, 4, dtype=torch.bool), keep=keep)
    assert kept[0].nonzero().flatten().tolist() == sorted([2, 0, 1][:keep])
    hidden = select(votes.view(1, 1, 4), torch.tensor([[True, True, False, True]]), keep=keep)
    assert hidden[0].nonzero().flatten().tolist() == sorted([0, 1, 3][:keep])
