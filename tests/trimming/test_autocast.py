"""Scores and choices are float32 arithmetic, whatever the caller lets torch cast down."""

from __future__ import annotations

import pytest
import torch

import crosstrim
from crosstrim import select
from crosstrim.method import policies
from crosstrim.method.policies import POLICIES, Evidence
from tests.support import tiny
from tests.support.passes import kept
from tests.support.tiny import Image

LOW = [torch.bfloat16, torch.float16]


def evidence():
    generator = torch.Generator().manual_seed(3)
    visible = torch.ones(2, 680, dtype=torch.bool)
    visible[1, 500:] = False
    return Evidence(
        saliency=torch.rand(2, 8, 680, generator=generator),
        visible=visible,
        keys=torch.randn(2, 4, 680, 32, generator=generator),
        values=torch.randn(2, 4, 680, 32, generator=generator),
        budget=torch.tensor([[60], [40]]),
        features_per_image=680,
        features_per_tile=170,
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_vote_alike(name, dtype):
    one, policy = evidence(), policies.voter(name)
    expected = policy(one)
    with torch.autocast("cpu", dtype=dtype):
        votes = policy(one)
        chosen = select(votes, one.visible, keep=60, features_per_image=680)
    assert votes.dtype == expected.dtype
    assert torch.equal(votes, expected)
    assert torch.equal(chosen, select(expected, one.visible, keep=60, features_per_image=680))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_saliency_is_the_same(dtype):
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(1, 8, 9, 32, generator=generator), torch.randn(1, 4, 200, 32, generator=generator)
    visible = torch.rand(1, 9, 200, generator=generator) > 0.2
    expected = crosstrim.saliency(queries, keys, visible)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(crosstrim.saliency(queries, keys, visible), expected)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_float32_leader_chooses_alike_under_autocast(model, name, monkeypatch):
    """The layers before are cast down in both runs: what is compared is the choice on the same evidence."""
    batch, seen = tiny.inputs([2, Image(4), 9], [1, Image(2, seed=1), 14]), []
    real = policies.votes_of

    def votes_of(policy, one):
        seen.append(one)
        return real(policy, one)

    monkeypatch.setattr(policies, "votes_of", votes_of)
    lowered = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.no_grad(), crosstrim.trim(model, keep=9, policy=name) as trimmed, lowered:
        model(**batch)
        chosen = kept(trimmed)
    (one,) = seen
    expected = select(policies.voter(name)(one), one.visible, keep=9, features_per_image=68)
    assert chosen == [[tuple(row.nonzero().flatten().tolist())] for row in expected]
