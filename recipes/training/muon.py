"""Muon in float32: torch's own multiplies in bfloat16, which takes ten times as long where a processor has none."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` as the recipe uses it (Nesterov's momentum, the original rate), in float32 throughout."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for matrix in group["params"]:
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                buffer = state["momentum_buffer"]
                buffer.lerp_(matrix.grad, 1 - momentum)
                update = orthogonal(matrix.grad.lerp(buffer, momentum), group["ns_coefficients"], group["ns_steps"])
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1])))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return about the nearest matrix with orthogonal rows or columns, by the quintic Newton-Schulz iteration.

    Every singular value ends between about 0.7 and 1.2, not at 1: Jordan et al., Muon, 2024.
    """
    a, b, c = coefficients
    flat = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    flat = flat / flat.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = flat @ flat.T
        flat = torch.addmm(flat, torch.addmm(gram, gram, gram, beta=b, alpha=c), flat, beta=a)
    return flat.T if matrix.shape[0] > matrix.shape[1] else flat
