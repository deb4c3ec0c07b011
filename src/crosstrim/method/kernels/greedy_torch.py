"""Greedy choices in torch: the reference, and what a CPU runs."""

from __future__ import annotations

import math

import torch

AHEAD = 128
"""Among so many features the next ones are sought at once, on a CPU."""

_LEAST = 1e-20
"""Variance that is divided by when nothing is left."""


def marginal_relevance(gain: torch.Tensor, unit: torch.Tensor, weight: float, steps: int) -> torch.Tensor:
    """Again and again take the feature with the best gain less `weight` times its largest cosine to those taken.

    The first of equals is taken. What is left of every feature's gain beside feature i is a row of numbers, and a
    feature's score is the least of the rows of those taken. A CPU computes only the rows of those (lazily, as Minoux
    1978 does); elsewhere, where the host must not wait for the choice, all of them are computed beforehand.

    Args:
        gain: [R, P] float32, minus infinity where a feature must not be taken.
        unit: [R, P, S] float32, unit vectors.
        weight: of the largest cosine.
        steps: how many to take.

    Returns:
        [R, steps] int64; 0 again and again once a row of R has no more to take.
    """
    if gain.device.type == "cpu":
        return torch.stack([_least_alike_of_one(*image, weight, steps) for image in zip(gain, unit, strict=True)])
    return _least_alike_of_all(gain, unit, weight, steps)


def gains_left(gain: torch.Tensor, unit: torch.Tensor, weight: float) -> torch.Tensor:
    """[R, P, P]: what is left of every feature's gain beside each one that is taken; nothing of its own."""
    left = torch.baddbmm(gain.unsqueeze(1), unit, unit.transpose(1, 2), alpha=-weight)
    left.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return left


def _least_alike_of_all(gain: torch.Tensor, unit: torch.Tensor, weight: float, steps: int) -> torch.Tensor:
    """What `marginal_relevance` takes, without a look from the host."""
    rows, score = gains_left(gain, unit, weight).flatten(0, 1), gain + weight
    first_row = torch.arange(len(gain), device=gain.device) * gain.shape[1]
    taken = torch.empty(len(gain), steps, dtype=torch.long, device=gain.device)
    for place in range(steps):
        best = score.argmax(-1)
        taken[:, place] = best
        torch.minimum(score, rows.index_select(0, first_row + best), out=score)
    return taken


def _least_alike_of_one(gain: torch.Tensor, unit: torch.Tensor, weight: float, steps: int) -> torch.Tensor:
    """[steps] int64 of gains [P] and unit vectors [P, S] on a CPU."""
    score = gain + weight
    taken: list[int] = []
    while len(taken) < steps and score.max() > -torch.inf:
        now = _next_least_alike(score, gain, unit, weight)[: steps - len(taken)]
        score = score.minimum(torch.addmm(gain, unit[now], unit.T, alpha=-weight).amin(0))
        score[now] = -torch.inf
        taken += now.tolist()
    return torch.tensor(taken + [0] * (steps - len(taken)), dtype=torch.long, device=gain.device)


def _next_least_alike(score: torch.Tensor, gain: torch.Tensor, unit: torch.Tensor, weight: float) -> torch.Tensor:
    """Places of the next features to take, at least one."""
    few, floor = _few(score)
    own, left = score[few].numpy(), gains_left(gain[few].unsqueeze(0), unit[few].unsqueeze(0), weight)[0].numpy()
    taken: list[int] = []
    while own[best := int(own.argmax())] > floor or not taken:
        taken.append(best)
        own.clip(None, left[best], out=own)  # the lower of the two
    return few[taken]


def _few(score: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Places of the highest scores, the best of all among them, and what no other is above.

    Scores only fall as features are taken. So the best of these few is the best of all as long as it is above what
    the others were, and until then nobody needs to know what those taken leave of all others. What is done among few
    is done in numpy, which finds the largest of them in a tenth of torch's time.
    """
    likely = score.clone()
    likely[score.argmax()] = torch.inf  # the first of equals, which topk might pass over
    few = likely.topk(min(AHEAD, len(score))).indices.sort().values
    return few, -math.inf if len(few) == len(score) else float(score[few].min())


def determinantal(
    quality: torch.Tensor, variance: torch.Tensor, unit: torch.Tensor, width: float, steps: int
) -> torch.Tensor:
    """Again and again take the feature with the most variance that those taken do not explain.

    An incremental Cholesky decomposition of the matrix `kernel_rows`, Chen et al. (arXiv 1709.05135). A step takes
    longer the more were taken before it; a CPU takes several features among `AHEAD` at once, so that it reads what
    it knows of those taken before once for all of them.

    Args:
        quality: [R, P] float32, above 0.
        variance: [R, P] float32, its square; minus infinity where a feature must not be taken.
        unit: [R, P, S] float32, unit vectors.
        width: of the kernel.
        steps: how many to take.

    Returns:
        [R, steps] int64; 0 again and again once a row of R has no more to take.
    """
    if quality.device.type == "cpu":
        images = zip(quality, variance, unit, strict=True)
        return torch.stack([_least_explained_of_one(*image, width, steps) for image in images])
    return _least_explained_of_all(quality, variance, unit, width, steps)


def _least_explained_of_all(
    quality: torch.Tensor, variance: torch.Tensor, unit: torch.Tensor, width: float, steps: int
) -> torch.Tensor:
    """What `determinantal` takes, without a look from the host."""
    rows = quality.new_zeros(len(quality), steps, quality.shape[1])
    taken = torch.empty(len(quality), steps, dtype=torch.long, device=quality.device)
    for place in range(steps):
        best = variance.argmax(-1, keepdim=True)
        taken[:, place] = best[:, 0]
        chosen = unit.gather(1, best.unsqueeze(-1).expand(-1, 1, unit.shape[-1]))
        alike = kernel_rows(quality.gather(-1, best), chosen, quality, unit, width).squeeze(1)
        before = rows[:, :place]
        at_best = before.gather(-1, best.unsqueeze(1).expand(-1, place, 1))
        known = (at_best.transpose(1, 2) @ before).squeeze(1)
        rows[:, place] = (alike - known) / variance.gather(-1, best).clamp_min(_LEAST).sqrt()
        variance = (variance - rows[:, place].square()).scatter(-1, best, -torch.inf)
    return taken


def _least_explained_of_one(
    quality: torch.Tensor, variance: torch.Tensor, unit: torch.Tensor, width: float, steps: int
) -> torch.Tensor:
    """[steps] int64 of qualities [P], variances [P] and unit vectors [P, S] on a CPU."""
    rows = quality.new_empty(steps, len(quality))
    taken: list[int] = []

    def unexplained(some: torch.Tensor, others: torch.Tensor | slice) -> torch.Tensor:
        whole = kernel_rows(quality[some], unit[some], quality[others], unit[others], width)
        return whole - rows[: len(taken), some].T @ rows[: len(taken), others]

    while len(taken) < steps and variance.max() > -torch.inf:
        few, floor = _few(variance)
        places, factor = _decomposed(unexplained(few, few), variance[few], floor, steps - len(taken))
        now = few[places]
        own = torch.linalg.solve_triangular(factor, unexplained(now, slice(None)), upper=False)
        rows[len(taken) : len(taken) + len(now)] = own
        variance = variance - own.square().sum(0)
        variance[now] = -torch.inf
        taken += now.tolist()
    return torch.tensor(taken + [0] * (steps - len(taken)), dtype=torch.long, device=quality.device)


def _decomposed(
    matrix: torch.Tensor, variance: torch.Tensor, floor: float, most: int
) -> tuple[list[int], torch.Tensor]:
    """Which of `matrix` [F, F] to take, one and more as long as they are above the floor, and their Cholesky factor.

    The factor is [n, n], lower.
    """
    left, own = matrix.numpy(), variance.numpy()
    taken: list[int] = []
    factor = matrix.new_empty(min(most, len(left)), len(left))
    rows = factor.numpy()
    while len(taken) < len(rows) and (own[best := int(own.argmax())] > floor or not taken):
        before, root = rows[: len(taken)], math.sqrt(max(own[best], _LEAST))
        row = (left[best] - before[:, best] @ before) / root
        row[best] = root
        own -= row * row
        own[best] = -math.inf
        rows[len(taken)] = row
        taken.append(best)
    return taken, factor[: len(taken), taken].T


def kernel_rows(
    quality: torch.Tensor, unit: torch.Tensor, others: torch.Tensor, their_unit: torch.Tensor, width: float
) -> torch.Tensor:
    """[..., Q, P]: q_i * exp((cos_ij - 1) / width) * q_j; the exponential keeps the matrix of full rank."""
    alike = torch.exp((unit @ their_unit.mT - 1) / width)
    return alike * others.unsqueeze(-2) * quality.unsqueeze(-1)
