"""Encode images once and hand the features to many forward passes: the vision tower is most of a short answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from crosstrim.models import mllama

INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
"""What the processor makes of pictures."""


@torch.no_grad()
def encode(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the cross-attention layers read of the images, with whatever repairs the model carries.

    Args:
        model: a loaded Mllama.
        inputs: of the processor: pixel_values, aspect_ratio_ids and aspect_ratio_mask of B samples.

    Returns:
        [B, images * tiles, features per tile, hidden].
    """
    inner = cast(Any, mllama.locate(model).model)
    states = inner.vision_model(**{name: inputs[name] for name in INPUTS}).last_hidden_state
    states = inner.multi_modal_projector(states)
    return cast(torch.Tensor, states.reshape(states.shape[0], -1, *states.shape[-2:]))


@contextlib.contextmanager
def given(model: nn.Module, features: torch.Tensor) -> Iterator[None]:
    """Inside the block, forward passes that bring pixel_values read `features` in place of encoding them.

    That holds for the calling thread; passes of other threads keep their own pictures.

    Args:
        model: a loaded Mllama, trimmed or not.
        features: of `encode`, one row for each sample of every such pass.
    """
    thread = threading.get_ident()

    def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is not None and threading.get_ident() == thread:
            kwargs["pixel_values"] = None
            kwargs["cross_attention_states"] = features.flatten(0, 1)
        return args, kwargs

    hook = mllama.locate(model).model.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
