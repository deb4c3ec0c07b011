"""Decoding steps under `torch.compile`: the same masks, by means that can be traced.

The other hooks look into tensors, at the calling thread and at a context variable, none of which a compiled graph
can. They step aside while torch compiles, and what is here takes their place: what was kept is read off the cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from crosstrim.errors import InputError
from crosstrim.models import cache as caches
from crosstrim.models import mllama, names


def put_on(model: mllama.Mllama) -> list[RemovableHandle]:
    """Register the hooks that a compiled decoding step follows."""
    return [
        layer.register_forward_pre_hook(partial(_shorten_mask, index, names.cache_keyword()), with_kwargs=True)
        for layer, index in zip(model.cross_layers, model.layer_indices, strict=True)
    ]


def compiling() -> bool:
    """Whether this very code is being traced; `torch.compiler.is_compiling` also knows of other threads' work."""
    return torch.compiler.is_dynamo_compiling()


def refusal() -> InputError:
    """That choosing features depends on values, and so cannot be part of a graph."""
    return InputError(
        "a prompt with images was compiled, but which features to keep depends on values; compile decoding steps "
        'alone, as generate(cache_implementation="static", compile_config=...) does.'
    )


def stands_aside(kwargs: dict[str, Any]) -> bool:
    """Whether the pass with these arguments of the whole model is being compiled, and the usual hooks do nothing.

    Raises:
        InputError: it is, and it brings images.
    """
    if not compiling():
        return False
    if kwargs.get("pixel_values") is not None or kwargs.get("cross_attention_states") is not None:
        raise refusal()
    return True


def _shorten_mask(index: int, keyword: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not compiling():
        return None
    state = caches.traced_state(kwargs.get(keyword), index)
    if state is not None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("cross_attention_mask")
        kwargs["cross_attention_mask"] = state.trim_mask_traced(mask, hidden_states.shape[1], hidden_states.dtype)
    return args, kwargs
