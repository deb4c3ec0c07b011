"""Which kernel computes the attention each feature receives."""

from __future__ import annotations

from collections.abc import Callable

import torch

from crosstrim.errors import InputError
from crosstrim.method.kernels import saliency_torch
from crosstrim.method.kernels.asked import VARIABLE, triton_kernels

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_LARGEST_HEAD = 128


def kernel_for(
    queries: torch.Tensor,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """The `attention_received` that computes these queries; CROSSTRIM_KERNEL has a say, see `kernels.asked`.

    Args:
        queries: [B, Hq, T, D].

    Raises:
        ConfigError: as `triton_kernels`.
        MissingExtraError: as `triton_kernels`.
        InputError: the variable asks for Triton with a dtype or a head size that the kernel does not have.
    """
    kernels = triton_kernels("saliency_triton", queries.device) or saliency_torch
    if kernels is not saliency_torch and (
        queries.dtype not in TRITON_DTYPES or queries.shape[-1] > TRITON_LARGEST_HEAD
    ):
        raise InputError(
            f"{VARIABLE}=triton computes float32, bfloat16 and float16 with heads of up to {TRITON_LARGEST_HEAD} "
            f"numbers, got {queries.dtype} and {queries.shape[-1]}; set {VARIABLE}=auto."
        )
    return kernels.attention_received  # type: ignore[no-any-return]
