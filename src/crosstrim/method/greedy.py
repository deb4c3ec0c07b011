"""Greedy choices that trade relevance against likeness, for all images of a batch at once. Pure tensors.

One step takes one feature in every image, so the number of steps is the largest budget and not their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from crosstrim.method.kernels import greedy as kernels
from crosstrim.method.precision import full_precision

POOL = 4
"""A greedy choice is among this many times the budget, the most relevant ones: the rest could not win."""

SKETCH = 64
"""Dimensions that keys are projected to before they are compared, when they have more."""

CHUNK_BYTES = 512 * 2**20
"""How much the images that are worked on at once may take."""

Take = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""From relevance [R, P] (minus infinity where a row's pool has ended), unit vectors [R, P, S] and a count of steps to
the places [R, steps] that each of R images takes, in order. A row may go on after its pool is empty."""


def order(
    relevance: torch.Tensor, visible: torch.Tensor, keys: torch.Tensor, budget: torch.Tensor, steps: int, take: Take
) -> torch.Tensor:
    """Votes by the place in which each feature is taken; what is not taken follows by relevance.

    Args:
        relevance: [R, F] float32, not negative, for each of R images.
        visible: [R, F] bool.
        keys: [R, Hkv, F, D]; likeness is the cosine between the keys of all heads, side by side (see `sketch`).
        budget: [R] int64, how many features each image takes. It may be on the CPU while the others are on a device.
        steps: what no budget is above.
        take: the rule.

    Returns:
        [R, F] float32, the first one taken highest.
    """
    with full_precision(relevance.device):
        return _order(relevance, visible, keys, budget, steps, take)


def _order(
    relevance: torch.Tensor, visible: torch.Tensor, keys: torch.Tensor, budget: torch.Tensor, steps: int, take: Take
) -> torch.Tensor:
    budget = budget.to(visible.device, non_blocking=True).minimum(visible.sum(-1))
    ranked = relevance.masked_fill(~visible, -1.0).argsort(dim=-1, descending=True, stable=True)
    size = ranked.shape[1]
    places = torch.arange(size, device=ranked.device)
    votes = torch.empty_like(relevance).scatter_(-1, ranked, -(places + size).to(relevance.dtype).expand_as(ranked))
    pooled = min(POOL * steps, size)
    inside = places[:pooled] < (POOL * budget).minimum(visible.sum(-1)).unsqueeze(-1)
    pool = ranked[:, :pooled].masked_fill(~inside, size - 1).sort(dim=-1).values  # so that ties go to the lower index
    inside = inside.sort(dim=-1, descending=True).values
    scale = relevance.masked_fill(~visible, 0.0).amax(-1, keepdim=True).clamp_min(1e-30)
    wanted = (relevance.gather(-1, pool) / scale).masked_fill(~inside, -torch.inf)
    rows = max(1, CHUNK_BYTES // max(1, 4 * pooled * (pooled + steps + SKETCH + keys.shape[-1])))
    for start in range(0, len(votes) if steps else 0, rows):
        chunk = slice(start, start + rows)
        unit = sketch(keys[chunk], pool[chunk])
        taken = pool[chunk].gather(-1, take(wanted[chunk], unit, steps))
        late = places[:steps] >= budget[chunk].unsqueeze(-1)
        # What a row takes beyond its budget, to keep its mates company, is not chosen: it stays where it was.
        place = torch.where(late, votes[chunk].gather(-1, taken), -places[:steps].to(votes.dtype))
        votes[chunk] = votes[chunk].scatter_reduce(-1, taken, place, "amax")
    return votes


def marginal_relevance(relevance: torch.Tensor, unit: torch.Tensor, steps: int, balance: float) -> torch.Tensor:
    """Again and again take the feature with the best relevance less its likeness to those taken.

    Maximal marginal relevance, Carbonell and Goldstein 1998.

    Args:
        relevance: [R, P], at most 1.
        unit: [R, P, S].
        steps: how many to take.
        balance: weight of relevance in [0, 1]; the rest weighs the largest cosine to a taken feature.

    Returns:
        [R, steps] int64.
    """
    # 0 times minus infinity would be no number, which argmax prefers to all numbers.
    gain = (balance * relevance).masked_fill(relevance == -torch.inf, -torch.inf)
    return kernels.marginal_relevance(gain, unit, 1 - balance, steps)


def determinantal(relevance: torch.Tensor, unit: torch.Tensor, steps: int, width: float) -> torch.Tensor:
    """Greedy MAP of a determinantal point process, by the incremental Cholesky of Chen et al. (arXiv 1709.05135).

    The kernel is q_i * exp((cos_ij - 1) / width) * q_j; the exponential keeps it of full rank.

    Args:
        relevance: [R, P], the quality q.
        unit: [R, P, S].
        steps: how many to take.
        width: how alike two features must be to count as the same; smaller forgives more.

    Returns:
        [R, steps] int64.
    """
    quality = relevance.clamp_min(1e-6)
    variance = quality.square().masked_fill(relevance == -torch.inf, -torch.inf)
    return kernels.determinantal(quality, variance, unit, width, steps)


def sketch(keys: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Unit vectors whose products approximate the cosines between the keys of some features.

    The keys of all heads stand side by side, each head's scaled to unit length; more than `SKETCH` dimensions are
    projected at random (Johnson-Lindenstrauss), with a fixed seed.

    Args:
        keys: [R, Hkv, F, D].
        pool: [R, P] int64, which features.

    Returns:
        [R, P, S] float32.
    """
    heads, size = keys.shape[1], keys.shape[-1]
    each = (own.float() for own in _picked(keys, pool))
    if heads * size <= SKETCH:
        return F.normalize(torch.cat([F.normalize(own, dim=-1) for own in each], dim=-1), dim=-1)
    # Always drawn on the CPU and in float32, whatever the caller made torch's defaults: the same on every machine.
    seeded = torch.Generator("cpu").manual_seed(0)
    projection = torch.randn(heads, size, SKETCH, generator=seeded, dtype=torch.float32, device="cpu")
    projection = projection.to(keys.device, non_blocking=True)
    projected = torch.zeros(*pool.shape, SKETCH, dtype=torch.float32, device=keys.device)
    product = torch.empty_like(projected)  # as in `_picked`, one piece of memory for all
    for head, own in enumerate(each):  # one after the other: side by side they would be as large as the keys
        torch.matmul(own, projection[head], out=product)
        # Scaled to unit length once there are fewer numbers to scale.
        projected.addcdiv_(product, torch.linalg.vector_norm(own, dim=-1, keepdim=True).clamp_min(1e-12))
    return F.normalize(projected, dim=-1)


def _picked(keys: torch.Tensor, places: torch.Tensor) -> Iterator[torch.Tensor]:
    """Head by head the [R, P, D] of keys [R, Hkv, F, D] at places [R, P]; good until the next one is asked for."""
    # Whole rows at once, which a CPU copies in a third of the time that an index for every number takes, and into
    # memory that it has already: new memory takes it four times as long.
    own = keys.new_empty(*places.shape, keys.shape[-1])
    for head in keys.unbind(1):
        for features, those, out in zip(head, places, own, strict=True):
            torch.index_select(features, 0, those, out=out)
        yield own
