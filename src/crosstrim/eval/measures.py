"""How sparse attention is, and how far layers agree about it: pure tensors of one sample's visible features.

Every function takes scores [..., m] or [V, m] over the m visible features: V voters, which are heads or layers, and
the attention each feature received of each. All is computed in float64. Definitions are ours; the paper states the
two observations and, in the sources at hand, no formula.
"""

from __future__ import annotations

import torch

from crosstrim.errors import InputError
from crosstrim.method.selection import select

_ROUNDING = 1e-9
"""Sums may miss a mass by this share of it and still count as reaching it."""


def mass_share(scores: torch.Tensor, mass: float) -> torch.Tensor:
    """The smallest share of the features that holds a share of the attention.

    Args:
        scores: [..., m], non-negative, not all zero along m.
        mass: in (0, 1].

    Returns:
        [...] float64: the fewest features whose scores sum to `mass` of the total, divided by m.

    Raises:
        InputError: scores sum to zero.
    """
    cumulative = _cumulative(scores)
    reached = cumulative >= mass * (1 - _ROUNDING)
    return ((~reached).sum(-1) + 1).clamp_max(scores.shape[-1]).double() / scores.shape[-1]


def held_by_top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The most attention that `count` features can hold, as a share of all: [..., m] to [...] float64.

    Raises:
        InputError: scores sum to zero, or `count` is not in 1 .. m.
    """
    if not 1 <= count <= scores.shape[-1]:
        raise InputError(f"count={count} must be between 1 and {scores.shape[-1]}, the features there are.")
    return _cumulative(scores)[..., count - 1]


def held_by(scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The attention that the features `kept` hold, as a share of all.

    Args:
        scores: [..., m], non-negative, not all zero along m.
        kept: [m] bool.

    Returns:
        [...] float64.

    Raises:
        InputError: scores sum to zero.
    """
    return (scores.double() * kept).sum(-1) / _total(scores).squeeze(-1)


def overlap(scores: torch.Tensor, share: float) -> torch.Tensor:
    """How far voters name the same features: |A ∩ B| / c for the sets A and B of each one's top c = ceil(share * m).

    Two random sets would overlap by c / m on average.

    Args:
        scores: [V, m]; ties go to the lower index.
        share: in (0, 1].

    Returns:
        [V, V] float64, symmetric, ones on the diagonal.
    """
    everything = torch.ones_like(scores, dtype=torch.bool)
    tops = select(scores.unsqueeze(1), everything, keep=float(share)).double()
    return tops @ tops.T / tops[0].sum()


def rank_correlation(scores: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation of every pair of voters: Pearson's of the ranks; ties share their mean rank.

    Args:
        scores: [V, m].

    Returns:
        [V, V] float64, symmetric. A voter that scores all features alike ranks nothing: its correlations are 0.
    """
    ordered, scores = scores.sort(dim=-1).values.contiguous(), scores.contiguous()
    first, behind = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))
    ranks = (first + behind).double()
    ranks = ranks - ranks.mean(-1, keepdim=True)
    norms = ranks.norm(dim=-1, keepdim=True)
    ranks = torch.where(norms > 0, ranks / norms, 0)
    return (ranks @ ranks.T).clamp(-1, 1)


def _cumulative(scores: torch.Tensor) -> torch.Tensor:
    """[..., m]: what the largest 1, 2, ... scores hold, as shares of all."""
    return scores.double().sort(dim=-1, descending=True).values.cumsum(-1) / _total(scores)


def _total(scores: torch.Tensor) -> torch.Tensor:
    total = scores.double().sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise InputError("scores sum to zero: no text row sees a feature, so there is no attention to measure.")
    return total
