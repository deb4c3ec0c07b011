"""Which kernel computes the attention each feature receives."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from crosstrim.errors import ConfigError, InputError, MissingExtraError
from crosstrim.method.kernels import saliency_torch

VARIABLE = "CROSSTRIM_KERNEL"
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_LARGEST_HEAD = 128


def kernel_for(
    queries: torch.Tensor,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """The `attention_received` that computes these queries; CROSSTRIM_KERNEL, read at each call, has a say.

    "auto", the default, is torch: Triton's kernel has not been run on a GPU yet, and no measurement says that it is
    the faster one there. "torch" and "triton" are taken at their word.

    Args:
        queries: [B, Hq, T, D].

    Raises:
        ConfigError: the variable has another value, or asks for Triton on a CPU without Triton's interpreter.
        MissingExtraError: it asks for Triton, which is not installed.
        InputError: it asks for Triton with a dtype or a head size that the kernel does not have.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in ("auto", "torch", "triton"):
        raise ConfigError(f"{VARIABLE} is {choice!r}; it must be auto, torch or triton.")
    if choice in ("auto", "torch"):
        return saliency_torch.attention_received
    try:
        from crosstrim.method.kernels import saliency_triton
    except ImportError as error:
        raise MissingExtraError(
            f"{VARIABLE}=triton needs Triton, which cannot be imported ({error}): pip install 'crosstrim[kernels]', "
            f"or set {VARIABLE}=auto."
        ) from error
    if queries.dtype not in TRITON_DTYPES or queries.shape[-1] > TRITON_LARGEST_HEAD:
        raise InputError(
            f"{VARIABLE}=triton computes float32, bfloat16 and float16 with heads of up to {TRITON_LARGEST_HEAD} "
            f"numbers, got {queries.dtype} and {queries.shape[-1]}; set {VARIABLE}=auto."
        )
    if not queries.is_cuda and not saliency_triton.INTERPRETED:
        raise ConfigError(
            f"{VARIABLE}=triton needs tensors on a GPU, these are on {queries.device}; set {VARIABLE}=auto, or "
            "TRITON_INTERPRET=1 before Python starts to run the kernel slowly on the CPU."
        )
    return saliency_triton.attention_received
