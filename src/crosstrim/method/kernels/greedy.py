"""Which kernels choose greedily."""

from __future__ import annotations

import torch

from crosstrim.method.kernels import greedy_torch
from crosstrim.method.kernels.asked import triton_kernels


def marginal_relevance(gain: torch.Tensor, unit: torch.Tensor, weight: float, steps: int) -> torch.Tensor:
    """As `greedy_torch.marginal_relevance`, by the kernel that CROSSTRIM_KERNEL asks for.

    Raises:
        ConfigError: as `triton_kernels`.
        MissingExtraError: as `triton_kernels`.
    """
    kernels = triton_kernels("greedy_triton", gain.device) or greedy_torch
    return kernels.marginal_relevance(gain, unit, weight, steps)  # type: ignore[no-any-return]


def determinantal(
    quality: torch.Tensor, variance: torch.Tensor, unit: torch.Tensor, width: float, steps: int
) -> torch.Tensor:
    """As `greedy_torch.determinantal`, by the kernel that CROSSTRIM_KERNEL asks for.

    Raises:
        ConfigError: as `triton_kernels`.
        MissingExtraError: as `triton_kernels`.
    """
    kernels = triton_kernels("greedy_triton", quality.device) or greedy_torch
    return kernels.determinantal(quality, variance, unit, width, steps)  # type: ignore[no-any-return]
