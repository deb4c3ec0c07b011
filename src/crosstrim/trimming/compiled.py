"""Decoding steps under `torch.compile`: the same masks, by means that can be traced.

A pass otherwise looks into tensors, which a compiled graph cannot. What was kept is read off the cache, and a choice
is no part of a graph.
"""

from __future__ import annotations

from typing import Any

import torch

from crosstrim.errors import InputError
from crosstrim.models.interface import Attended, Call
from crosstrim.trimming.cache import ImageLayer
from crosstrim.trimming.kept import Kept


def compiling() -> bool:
    """Whether this very code is being traced; `torch.compiler.is_compiling` also knows of other threads' work."""
    return torch.compiler.is_dynamo_compiling()


def refusal() -> InputError:
    """That choosing features depends on values, and so cannot be part of a graph."""
    return InputError(
        "a prompt with images was compiled, but which features to keep depends on values; compile decoding steps "
        'alone, as generate(cache_implementation="static", compile_config=...) does.'
    )


class CompiledStep:
    """A pass that brings no image, while it is being compiled.

    Args:
        cache: of transformers, or None.
        indices: of the cross-attention layers.
    """

    images = None

    def __init__(self, cache: Any, indices: tuple[int, ...]) -> None:
        self.kept: dict[int, Kept | None] = {}
        for index in indices:
            layer = None if cache is None else cache.layers[index]
            self.kept[index] = layer.kept if isinstance(layer, ImageLayer) and not layer.whole else None

    def attend(self, call: Call) -> Attended:
        """Attend to what was kept."""
        kept = self.kept[call.layer]
        if kept is None:
            return call.attend(call.mask)
        return call.attend(kept.trim_mask_traced(call.mask, call.queries.shape[2], call.queries.dtype))
