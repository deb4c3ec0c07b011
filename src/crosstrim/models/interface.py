"""transformers' attention interface: our function runs where a cross-attention layer attends, and stock ones inside.

What one forward pass is travels down the model as a keyword, which transformers hands from the model through its
layers to the attention function. Nothing is kept in a global place or per thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import nn

from crosstrim.method.attention import attend

KEYWORD = "crosstrim_pass"
"""The keyword under which a forward pass hands down what it is."""

NAME = "crosstrim"
"""What our attention function is called in transformers' register."""

Attended = tuple[torch.Tensor, torch.Tensor | None]
"""[B, T, Hq, D], or [B, T, Hq * D], and the weights where the implementation shows them."""


class ForwardPass(Protocol):
    """What a forward pass does where a cross-attention layer attends."""

    def attend(self, call: Call) -> Attended:
        """Carry the call out, on whatever part of its features."""
        ...


class Call:
    """One call of the attention function by one cross-attention layer.

    Attributes:
        layer: the layer's index in the decoder, which is also its place in the KV cache.
        queries: [B, Hq, T, D], after the query norm.
        keys: [B, Hkv, N, D], after the key norm; what the cache holds included.
        values: [B, Hkv, N, D].
        mask: additive [B, 1, T, N], or None, which hides nothing.
        scale: factor on q·k before the softmax.
    """

    def __init__(
        self, view: View, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, options: Any
    ) -> None:
        self.queries, self.keys, self.values, self.mask = queries, keys, values, mask
        self.layer, self.scale = view.layer, options["scaling"]
        self._view, self._options = view, options

    def attend(
        self,
        mask: torch.Tensor | None,
        counts: tuple[int, ...] | None = None,
        bias: torch.Tensor | None = None,
    ) -> Attended:
        """The layer's own attention under a mask, or without any where counts say as much and that is quicker.

        "eager" is asked for to see the weights, and other implementations have kernels of their own. Without a mask
        transformers attends causally unless it is told otherwise, and so must a trimmed model.

        Args:
            mask: additive [B, 1, T, N], or None.
            counts: of each sample the features that every row reads, from the first on; None: the mask says.
            bias: [B, N], what the mask adds to the logits of these features in every row; None: nothing.
        """
        implementation, options = self._view.own._attn_implementation, self._options
        if (
            counts is None
            or implementation != "sdpa"
            or options.get("dropout")
            or (self.mask is None and options.get("is_causal") is not False and self.queries.shape[2] > 1)
            # One call for each length was measured on CPUs alone.
            or (self.queries.device.type != "cpu" and len(set(counts)) > 1)
        ):
            return self._view.stock(self.queries, self.keys, self.values, mask, options)
        return attend(self.queries, self.keys, self.values, counts, self.scale, bias), None


class _AsItWas:
    """An attention module that reads its own config: stock functions look up their name there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class View:
    """An attention module's config, in which our function is the implementation; the rest is the config's own.

    Args:
        module: the attention module of a cross-attention layer.

    Attributes:
        own: the config. What it calls the implementation would attend if we did not, and may be set anew at any time.
        layer: index of the layer.
    """

    _attn_implementation = NAME

    def __init__(self, module: nn.Module) -> None:
        self.own: Any = module.config
        self.layer = cast(int, module.layer_idx)
        self._as_it_was = _AsItWas(module, self.own)

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.own, name)

    def stock(self, queries: Any, keys: Any, values: Any, mask: Any, options: dict[str, Any]) -> Attended:
        """What transformers' own function makes of these."""
        from transformers.models.mllama import modeling_mllama as modeling

        found = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.own._attn_implementation, modeling.eager_attention_forward
        )
        return cast(Attended, found(self._as_it_was, queries, keys, values, mask, **options))


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> Attended:
    """What transformers calls in place of the layer's own attention function."""
    view, step = module.config, options.pop(KEYWORD, None)
    if step is None:
        return cast(Attended, view.stock(query, key, value, attention_mask, options))
    return cast(Attended, step.attend(Call(view, query, key, value, attention_mask, options)))


class Taken:
    """Cross-attention modules whose attention we carry out, until `give_back()`."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attention)
        self._modules = tuple(modules)
        for module in self._modules:
            module.config = cast(Any, View(module))

    def give_back(self) -> None:
        """Every module reads its own config again; a second call does nothing."""
        for module in self._modules:
            module.config = cast(Any, module.config).own
        self._modules = ()
