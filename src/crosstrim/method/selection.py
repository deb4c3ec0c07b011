"""From saliency to the kept features: each voter's top-k per image, and the union of them.

The union is a threshold: let r(n) be the best (lowest) rank any voter gives feature n. The union of the voters'
top-c sets is exactly {n : r(n) < c}. So unions for growing c are nested, and one ordering, by
(r(n), -strongest vote, n), serves both knobs: `k` cuts where r(n) reaches the count each voter may choose, `keep`
takes the first features in that order until an exact budget is full.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import torch

from crosstrim.errors import InputError
from crosstrim.method import amount


def select(
    votes: torch.Tensor,
    visible: torch.Tensor,
    *,
    k: float | None = None,
    keep: float | int | None = None,
    k_base: Literal["visible", "all"] = "visible",
    features_per_image: int | None = None,
) -> torch.Tensor:
    """Choose the features that stay, image by image.

    With `k` every voter takes its top ceil(k * m) of the m visible features of an image, ties going to the lower
    index, and the union stays (section 3 of Trimmed Llama; per image and by visible count is ours). With `keep`
    the first ceil(keep * m), or `keep` itself when it is an int, in the order (best rank, -strongest vote, index)
    stay (ours). With neither, every visible feature stays.

    Args:
        votes: [B, V, N], V >= 1 voters, which in the paper are the query heads with their saliency. Of any dtype, and
            ranked as given. Minus infinity and NaN count as the lowest finite vote, so that an image keeps its budget
            all the same.
        visible: [B, N] bool, whether any text row sees the feature. Only visible features are ever kept.
        k: share in (0, 1] per voter.
        keep: share in (0, 1] (float) or number (int) of features per image.
        k_base: "visible", or "all" to take k of every feature of the image, padding counted.
        features_per_image: length of one image in N; None: N is one image.

    Returns:
        [B, N] bool, True where the feature stays.

    Raises:
        InputError: shapes do not fit, there is no voter, a value is out of range, or both k and keep are given.
    """
    k, keep = amount.checked(k, keep, k_base, InputError)
    _check(votes, visible, features_per_image)
    if k is None and keep is None:
        return visible.clone()
    size = features_per_image or votes.shape[-1]
    votes = _comparable(votes).unflatten(-1, (-1, size))
    visible = visible.unflatten(-1, (-1, size))
    rank = best_rank(votes, visible)
    budget = budget_of(visible, k=k, keep=keep, k_base=k_base).unsqueeze(-1)
    kept = rank < budget if k is not None else place_in_order(votes, rank) < budget
    return (kept & visible).flatten(1)


def budget_of(
    visible: torch.Tensor,
    *,
    k: float | None = None,
    keep: float | int | None = None,
    k_base: Literal["visible", "all"] = "visible",
) -> torch.Tensor:
    """How many features of each image a voter may name (`k`) or all of them together (`keep`).

    Args:
        visible: [B, I, F] bool.
        k: as for `select`.
        keep: as for `select`.
        k_base: as for `select`.

    Returns:
        [B, I] int64, never more than are visible. All visible ones with neither knob.
    """
    counts = visible.sum(-1)
    if k is not None:
        base = counts if k_base == "visible" else torch.full_like(counts, visible.shape[-1])
        return share_of(k, base).minimum(counts)
    if keep is None:
        return counts
    if isinstance(keep, int):
        return counts.clamp_max(min(keep, visible.shape[-1]))
    return share_of(keep, counts)


def most_of(size: int, **knobs: Any) -> int:
    """What `budget_of` gives an image of `size` features at most."""
    return int(budget_of(torch.ones(1, 1, size, dtype=torch.bool, device="cpu"), **knobs))


def best_rank(votes: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The best place, from 0, that any voter gives each feature; invisible features come last.

    Args:
        votes: [B, V, I, F] float, above minus infinity where visible.
        visible: [B, I, F] bool.

    Returns:
        [B, I, F] int64.
    """
    votes = votes.masked_fill(~visible.unsqueeze(1), float("-inf"))
    order = votes.argsort(dim=-1, descending=True, stable=True)
    return _places(order).amin(1)


def place_in_order(votes: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """The place, from 0, of each feature in the order (best rank, -strongest vote, index).

    Args:
        votes: [B, V, I, F] float.
        rank: [B, I, F] int64, from `best_rank`.

    Returns:
        [B, I, F] int64, a permutation of 0 .. F - 1 along the last dimension.
    """
    by_vote = votes.amax(1).argsort(dim=-1, descending=True, stable=True)
    by_rank = rank.gather(-1, by_vote).argsort(dim=-1, stable=True)
    return _places(by_vote.gather(-1, by_rank))


def share_of(fraction: float, counts: torch.Tensor) -> torch.Tensor:
    """Ceil(fraction * counts) in exact integer arithmetic; 0.07 of 100 is 7, which binary floats make 8.

    Args:
        fraction: above 0; taken as the decimal number it prints as, rounded to nine places, and never to 0.
        counts: int64 tensor.
    """
    exact = max(Fraction(str(fraction)).limit_denominator(10**9), Fraction(1, 10**9))
    return (counts * exact.numerator + exact.denominator - 1) // exact.denominator


def _comparable(votes: torch.Tensor) -> torch.Tensor:
    """Floats in the order of the votes, all above minus infinity, where there must be room for what is invisible."""
    if not votes.is_floating_point():
        if votes.is_meta:
            return votes.double()
        votes = votes.unique(return_inverse=True)[1].double()  # int64 has more digits than any float
    votes = votes if votes.dtype == torch.float64 else votes.float()
    lowest = torch.finfo(votes.dtype).min
    return votes.nan_to_num(nan=lowest, posinf=torch.inf, neginf=lowest)


def _places(order: torch.Tensor) -> torch.Tensor:
    """Invert permutations along the last dimension: where each index stands in `order`."""
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def _check(
    votes: torch.Tensor,
    visible: torch.Tensor,
    features_per_image: int | None,
) -> None:
    if votes.dim() != 3 or visible.shape != (votes.shape[0], votes.shape[2]) or visible.dtype != torch.bool:
        raise InputError(
            f"votes must be [B, V, N] and visible bool [B, N], got {tuple(votes.shape)} and "
            f"{visible.dtype} {tuple(visible.shape)}."
        )
    if not votes.shape[1]:
        raise InputError(f"votes of shape {tuple(votes.shape)} have no voter; V must be at least 1.")
    if features_per_image is not None and (features_per_image < 1 or votes.shape[-1] % features_per_image):
        raise InputError(
            f"features_per_image={features_per_image} does not divide the {votes.shape[-1]} features given."
        )
