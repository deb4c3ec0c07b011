"""Greedy choices in torch: the reference, and what a CPU runs."""

from __future__ import annotations

import numpy as np
import torch

AHEAD = 128
"""Among so many features the next ones are sought at once, on a CPU."""


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
        return torch.stack([_one_image(*image, weight, steps) for image in zip(gain, unit, strict=True)])
    return _all_images(gain, unit, weight, steps)


def gains_left(gain: torch.Tensor, unit: torch.Tensor, weight: float) -> torch.Tensor:
    """[R, P, P]: what is left of every feature's gain beside each one that is taken; nothing of its own."""
    left = torch.baddbmm(gain.unsqueeze(1), unit, unit.transpose(1, 2), alpha=-weight)
    left.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return left


def _all_images(gain: torch.Tensor, unit: torch.Tensor, weight: float, steps: int) -> torch.Tensor:
    """What `marginal_relevance` takes, without a look from the host."""
    rows, score = gains_left(gain, unit, weight).flatten(0, 1), gain + weight
    first_row = torch.arange(len(gain), device=gain.device) * gain.shape[1]
    taken = torch.empty(len(gain), steps, dtype=torch.long, device=gain.device)
    for place in range(steps):
        best = score.argmax(-1)
        taken[:, place] = best
        torch.minimum(score, rows.index_select(0, first_row + best), out=score)
    return taken


def _one_image(gain: torch.Tensor, unit: torch.Tensor, weight: float, steps: int) -> torch.Tensor:
    """[steps] int64 of gains [P] and unit vectors [P, S] on a CPU."""
    score, taken = gain + weight, []
    while len(taken) < steps and score.max() > -torch.inf:
        now = _best_of_few(score, gain, unit, weight)[: steps - len(taken)]
        score = score.minimum(torch.addmm(gain, unit[now], unit.T, alpha=-weight).amin(0))
        score[now] = -torch.inf
        taken += now.tolist()
    return torch.tensor(taken + [0] * (steps - len(taken)), dtype=torch.long, device=gain.device)


def _best_of_few(score: torch.Tensor, gain: torch.Tensor, unit: torch.Tensor, weight: float) -> torch.Tensor:
    """Places of the next features to take, at least one.

    Scores only fall. So the best of the few highest is the best of all as long as it is above the lowest of them was,
    and until then nobody needs to know what those taken leave of all others.
    """
    few = score.topk(min(AHEAD, len(score))).indices.sort().values
    own, left = score[few].numpy(), gains_left(gain[few].unsqueeze(0), unit[few].unsqueeze(0), weight)[0].numpy()
    floor = -np.inf if len(few) == len(score) else own.min()
    taken: list[int] = []
    # Numpy finds the largest of few in a tenth of torch's time.
    while own[best := int(own.argmax())] > floor:
        taken.append(best)
        np.minimum(own, left[best], out=own)
    return few[taken] if taken else score.argmax(0, keepdim=True)  # the first of equals, which topk might pass over


def determinantal(
    quality: torch.Tensor, variance: torch.Tensor, unit: torch.Tensor, width: float, steps: int
) -> torch.Tensor:
    """Again and again take the feature with the most variance that those taken do not explain.

    An incremental Cholesky decomposition of the matrix `kernel_rows`, Chen et al. (arXiv 1709.05135). A step takes
    longer the more were taken before it.

    Args:
        quality: [R, P] float32, above 0.
        variance: [R, P] float32, its square; minus infinity where a feature must not be taken.
        unit: [R, P, S] float32, unit vectors.
        width: of the kernel.
        steps: how many to take.

    Returns:
        [R, steps] int64; 0 again and again once a row of R has no more to take.
    """
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
        rows[:, place] = (alike - known) / variance.gather(-1, best).clamp_min(1e-20).sqrt()
        variance = (variance - rows[:, place].square()).scatter(-1, best, -torch.inf)
    return taken


def kernel_rows(
    quality: torch.Tensor, unit: torch.Tensor, others: torch.Tensor, their_unit: torch.Tensor, width: float
) -> torch.Tensor:
    """[R, Q, P]: q_i * exp((cos_ij - 1) / width) * q_j; the exponential keeps the matrix of full rank."""
    alike = torch.exp((unit @ their_unit.transpose(1, 2) - 1) / width)
    return alike * others.unsqueeze(1) * quality.unsqueeze(2)
