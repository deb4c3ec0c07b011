"""Mask-free attention in Mllama's cross-attention modules, by torch hooks alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from crosstrim.attention import attend
from crosstrim.forward import ForwardPass
from crosstrim.models import names


class _OneFeature:
    """Stands in for the KV cache in one call of a cross-attention module.

    Keys and values go to the real cache and come from it, but the module is handed those of one feature: its own
    attention then costs nothing, and what it makes is replaced.
    """

    def __init__(self, cache: Any, index: int) -> None:
        self._cache = cache
        if cache is not None and index < len(cache.layers) and cache.layers[index].is_initialized:
            layer = cache.layers[index]
            self.keys, self.values = layer.keys, layer.values  # once: a packed layer unpacks at every look
            self.layers = {index: SimpleNamespace(keys=self.keys[:, :, :1], values=self.values[:, :, :1])}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, *args, **kwargs)
        self.keys, self.values = keys, values
        return keys[:, :, :1], values[:, :, :1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


@dataclass
class _Call:
    cache: _OneFeature
    counts: tuple[int, ...]
    queries: torch.Tensor | None = None


class MaskFree:
    """Hooks on one cross-attention module that replace its attention by `attend` where no mask is needed.

    Where the forward pass says in `counts` that every row reads the first so many features of its sample, the
    mask says nothing more. Only "sdpa" is replaced: "eager" is asked for to see the weights, and other
    implementations have kernels of their own.

    Args:
        layer: a cross-attention decoder layer.
        current: the calling thread's forward pass, None outside of a trimmed one.
    """

    def __init__(self, layer: nn.Module, current: Callable[[], ForwardPass | None]) -> None:
        self._attention = cast(Any, layer).cross_attn
        self._query_norm, self._projection = self._attention.q_norm, self._attention.o_proj
        self._current = current

    def put_on(self) -> list[RemovableHandle]:
        """Register the hooks."""
        return [
            self._attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            self._query_norm.register_forward_hook(self._see_queries),
            self._projection.register_forward_pre_hook(self._before_projection),
        ]

    def _before_attention(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = self._current()
        if step is None:
            return None
        step.call = None
        if step.counts is None or not self._may_replace(module, step.counts, kwargs):
            return None
        cache = _OneFeature(names.cache_in(kwargs), module.layer_idx)
        step.call = _Call(cache, step.counts)
        return args, kwargs | {names.cache_keyword(): cache, "attention_mask": None, "is_causal": False}

    def _may_replace(self, module: Any, counts: tuple[int, ...], kwargs: dict[str, Any]) -> bool:
        hidden_states = kwargs["hidden_states"]
        # Without a mask transformers attends causally unless it is told otherwise, and so must a trimmed model.
        causal = kwargs.get("attention_mask") is None and kwargs.get("is_causal") is not False
        return (
            module.config._attn_implementation == "sdpa"
            and not (causal and hidden_states.shape[1] > 1)
            and not (module.training and module.dropout)
            # An adapter that was put around a projection since then would see our hook's input on one side only.
            and module.q_norm is self._query_norm
            and module.o_proj is self._projection
            # One call for each length was measured on CPUs alone.
            and (hidden_states.device.type == "cpu" or len(set(counts)) == 1)
        )

    def _see_queries(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        step = self._current()
        if step is not None and step.call is not None:
            step.call.queries = output

    def _before_projection(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        step = self._current()
        if step is None or step.call is None:
            return None
        call, step.call = step.call, None
        return (attend(call.queries, call.cache.keys, call.cache.values, call.counts, self._attention.scaling),)
