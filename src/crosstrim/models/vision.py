"""Encode images once and hand the features to many forward passes: the vision tower is most of a short answer."""

from __future__ import annotations

import contextlib
import hashlib
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


def state_of(model: nn.Module) -> bytes:
    """What the features of a picture follow from beside the picture, as a digest.

    It changes with the weights of the vision tower and the projection behind it (replaced, or written to where torch
    counts writes), their dtype and device, adapters put on, switched or scaled, hooks such as repairs, and autocast.

    Args:
        model: a loaded Mllama.
    """
    inner = cast(Any, mllama.locate(model).model)
    digest = hashlib.blake2b(digest_size=16)
    for part in (inner.vision_model, inner.multi_modal_projector):
        for name, module in part.named_modules():
            digest.update(repr((name, type(module).__qualname__, _plain(vars(module)))).encode())
            for table in (module._forward_pre_hooks, module._forward_hooks):
                digest.update(repr(list(table)).encode())  # torch numbers hooks and uses no number twice
            tensors = (*module._parameters.items(), *module._buffers.items())
            digest.update(repr([(key, _written(one)) for key, one in tensors if one is not None]).encode())
    device = next(inner.vision_model.parameters()).device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        digest.update(str(torch.get_autocast_dtype(device)).encode())
    return digest.digest()


def _plain(value: Any) -> Any:
    """Numbers, words and collections of them, for comparison; of anything else that it is there."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        plain = [_plain(one) for one in value]
        return sorted(plain, key=repr) if isinstance(value, set | frozenset) else plain
    return (
        value if value is None or isinstance(value, bool | int | float | str | torch.dtype) else type(value).__name__
    )


def _written(tensor: torch.Tensor) -> tuple[Any, ...]:
    writes = 0 if tensor.is_inference() else tensor._version  # tensors of inference mode keep no count
    return id(tensor), writes, tensor.dtype, tensor.device, tuple(tensor.shape)


@contextlib.contextmanager
def given(model: nn.Module, features: torch.Tensor) -> Iterator[None]:
    """Inside the block, forward passes that bring pixel_values read `features` in place of encoding them.

    That holds for the calling thread; passes of other threads keep their own pictures. A block inside another's gives
    its own features.

    Args:
        model: a loaded Mllama, trimmed or not.
        features: of `encode`, one row for each sample of every such pass.
    """
    thread, flat = threading.get_ident(), features.flatten(0, 1)

    def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is not None and threading.get_ident() == thread:
            kwargs["pixel_values"] = None
            kwargs["cross_attention_states"] = flat  # one object, by which a generation without a cache knows it
        return args, kwargs

    hook = mllama.locate(model).model.register_forward_pre_hook(swap, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()
