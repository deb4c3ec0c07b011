"""Greedy choices in Triton: one kernel takes all features of an image, one after the other."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crosstrim.method.kernels.greedy_torch import gains_left, kernel_rows

# With TRITON_INTERPRET=1 in the environment when this module is first imported, kernels run on the CPU, in numpy.
INTERPRETED: bool = triton.knobs.runtime.interpret


def marginal_relevance(gain: torch.Tensor, unit: torch.Tensor, weight: float, steps: int) -> torch.Tensor:
    """What `greedy_torch.marginal_relevance` takes, ties included. Scores stay on the chip; a step reads one row."""
    gain = gain.contiguous()
    images, size = gain.shape
    taken = torch.empty(images, steps, dtype=torch.long, device=gain.device)
    with torch.cuda.device_of(gain):  # does nothing on a CPU
        _take_least_alike[(images,)](
            taken, gain + weight, gains_left(gain, unit, weight), size, steps, **launch(size)
        )
    return taken


def determinantal(
    quality: torch.Tensor, variance: torch.Tensor, unit: torch.Tensor, width: float, steps: int
) -> torch.Tensor:
    """What `greedy_torch.determinantal` takes; sums run in another order, so ties may fall the other way."""
    images, size = quality.shape
    taken = torch.empty(images, steps, dtype=torch.long, device=quality.device)
    rows = torch.empty(images, steps, size, dtype=torch.float32, device=quality.device)
    alike = kernel_rows(quality, unit, quality, unit, width)
    with torch.cuda.device_of(quality):
        _take_least_explained[(images,)](taken, rows, variance.contiguous(), alike, size, steps, **launch(size))
    return taken


def launch(size: int) -> dict[str, int]:
    """What the kernels are compiled for: all features of an image in one block, 16 or fewer to a thread."""
    block = triton.next_power_of_2(max(size, 128))
    return {"BLOCK": block, "num_warps": min(32, max(4, block // 512))}


@triton.jit
def _take_least_alike(taken, first, left, size, steps, BLOCK: tl.constexpr):
    """Scores start as `first` [R, P]; once i is taken, none is above its number in row i of `left` [R, P, P]."""
    image = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < size
    score = tl.load(first + image * size + places, mask=inside, other=float("-inf"))
    for step in range(steps):
        best = tl.argmax(score, axis=0)  # the first of equals
        tl.store(taken + image * steps + step, best.to(tl.int64))
        row = tl.load(left + (image * size + best) * size + places, mask=inside, other=float("-inf"))
        score = tl.minimum(score, row)


@triton.jit
def _take_least_explained(taken, rows, first, alike, size, steps, BLOCK: tl.constexpr):
    """Variances start as `first` [R, P]; `alike` [R, P, P] is the kernel matrix, `rows` [R, steps, P] its factor."""
    image = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < size
    rows += image * steps * size
    variance = tl.load(first + image * size + places, mask=inside, other=float("-inf"))
    for step in range(steps):
        largest, best = tl.max(variance, axis=0, return_indices=True)
        tl.store(taken + image * steps + step, best.to(tl.int64))
        rest = tl.load(alike + (image * size + best) * size + places, mask=inside, other=0.0)
        for before in range(step):
            row = rows + before * size
            rest -= tl.load(row + best) * tl.load(row + places, mask=inside, other=0.0)
        rest /= tl.sqrt(tl.maximum(largest, 1e-20))
        tl.store(rows + step * size + places, rest, mask=inside)
        tl.debug_barrier()  # the next steps' threads read what all of them have written
        variance = tl.where(places == best, float("-inf"), variance - rest * rest)
