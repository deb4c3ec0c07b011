"""Which kernels are asked for: the environment variable CROSSTRIM_KERNEL, read at each call."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from crosstrim.errors import ConfigError, MissingExtraError

VARIABLE = "CROSSTRIM_KERNEL"


def triton_kernels(name: str, device: torch.device) -> ModuleType | None:
    """The module of this package that has Triton's kernels, if they are asked for; None for torch.

    "auto", the default, is torch: Triton's kernels have not been run on a GPU yet, and no measurement says that they
    are the faster ones there. "torch" and "triton" are taken at their word.

    Args:
        name: of the module.
        device: of the tensors.

    Raises:
        ConfigError: the variable has another value, or asks for Triton on a CPU without Triton's interpreter.
        MissingExtraError: it asks for Triton, which is not installed.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in ("auto", "torch", "triton"):
        raise ConfigError(f"{VARIABLE} is {choice!r}; it must be auto, torch or triton.")
    if choice != "triton":
        return None
    try:
        module = importlib.import_module(f"crosstrim.method.kernels.{name}")
    except ImportError as error:
        raise MissingExtraError(
            f"{VARIABLE}=triton needs Triton, which cannot be imported ({error}): pip install 'crosstrim[kernels]', "
            f"or set {VARIABLE}=auto."
        ) from error
    if device.type != "cuda" and not module.INTERPRETED:
        raise ConfigError(
            f"{VARIABLE}=triton needs tensors on a GPU, these are on {device}; set {VARIABLE}=auto, or "
            "TRITON_INTERPRET=1 before Python starts to run the kernel slowly on the CPU."
        )
    return module
