"""Sparsity and agreement against definitions written out with loops and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosstrim.errors import InputError
from crosstrim.eval import measures
from tests.support.statistics import pearson, ranks, top

# Few different values, so that ties are common.
rows = st.lists(st.integers(0, 6), min_size=1, max_size=30).filter(any)
pairs = st.integers(1, 30).flatmap(
    lambda size: st.lists(st.lists(st.integers(0, 6), min_size=size, max_size=size), min_size=2, max_size=3)
)
shares = st.sampled_from(["0.05", "0.1", "0.25", "0.5", "0.9", "0.99", "1.0"])


@given(rows, shares)
def test_mass_share(scores, mass):
    total, needed = sum(scores), 0
    while sum(sorted(scores, reverse=True)[:needed]) < Fraction(mass) * total:
        needed += 1
    found = measures.mass_share(torch.tensor([scores, scores]).float(), float(mass))
    assert found.tolist() == [needed / len(scores)] * 2


@given(rows, st.data())
def test_what_features_hold(scores, data):
    kept = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    count = data.draw(st.integers(1, len(scores)))
    tensor = torch.tensor(scores).float()
    held = measures.held_by(tensor, torch.tensor(kept)).item()
    assert held == pytest.approx(sum(one for one, stays in zip(scores, kept, strict=True) if stays) / sum(scores))
    most = measures.held_by_top(tensor, count).item()
    assert most == pytest.approx(sum(sorted(scores, reverse=True)[:count]) / sum(scores))


@given(pairs, shares)
def test_overlap(voters, share):
    count = math.ceil(Fraction(share) * len(voters[0]))
    tops = [top(scores, count) for scores in voters]
    expected = [[len(a & b) / count for b in tops] for a in tops]
    assert measures.overlap(torch.tensor(voters).float(), float(share)).tolist() == expected


@given(pairs)
def test_rank_correlation(voters):
    expected = [[pearson(ranks(a), ranks(b)) for b in voters] for a in voters]
    found = measures.rank_correlation(torch.tensor(voters).float())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_by_hand():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 2.0, 1.0]])
    assert measures.rank_correlation(scores)[0].tolist() == pytest.approx([1, -1, 0.8])
    assert measures.overlap(scores, 0.5)[0].tolist() == [1, 0, 1]
    assert measures.overlap(scores, 0.25)[0].tolist() == [1, 0, 0]
    assert measures.mass_share(scores[0], 0.7).item() == 0.5
    assert measures.mass_share(scores[0], 0.71).item() == 0.75


def test_uniform_attention_needs_the_mass_itself():
    assert measures.mass_share(torch.full((100,), 0.1), 0.9).item() == 0.9


def test_no_attention_is_refused():
    with pytest.raises(InputError, match="no text row sees a feature"):
        measures.mass_share(torch.zeros(2, 3), 0.5)
    with pytest.raises(InputError, match="no text row sees a feature"):
        measures.held_by(torch.zeros(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match="count=4 must be between 1 and 3"):
        measures.held_by_top(torch.ones(3), 4)
