"""transformers' attention interface: our function runs where a cross-attention layer attends, and stock ones inside.

What one forward pass is travels down the model as a keyword, which transformers hands from the model through its
layers to the attention function. Nothing is kept in a global place or per thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from crosstrim.method.attention import attend

KEYWORD = "crosstrim_pass"
"""The keyword under which a forward pass hands down what it is: an object with a method `attend`.

Where a cross-attention layer attends, that takes a `Call` and carries it out, on whatever part of its features.
"""

NAME = "crosstrim"
"""What our attention function is called in transformers' register."""

Attended = tuple[torch.Tensor, torch.Tensor | None]
"""[B, T, Hq, D], or [B, T, Hq * D], and the weights where the implementation shows them."""


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

    def __init__(self, module: Any, queries: Any, keys: Any, values: Any, mask: Any, options: dict[str, Any]) -> None:
        self.queries, self.keys, self.values, self.mask = queries, keys, values, mask
        self.layer, self.scale = cast(int, module.layer_idx), options["scaling"]
        self._module, self._options = module, options

    def attend(
        self, mask: torch.Tensor | None, counts: tuple[int, ...] | None = None, bias: torch.Tensor | None = None
    ) -> Attended:
        """The layer's own attention under a mask, or ours without any where counts say as much and that is quicker.

        "eager" is asked for to see the weights, and other implementations have kernels of their own. Without a mask
        transformers attends causally unless it is told otherwise, and so must a trimmed model.

        Args:
            mask: additive [B, 1, T, N], or None.
            counts: of each sample the features that every row reads, from the first on; None: the mask says.
            bias: [B, N], what the mask adds to the logits of these features in every row; None: nothing.
        """
        module, options = self._module.config.as_it_was, self._options
        name = module.config._attn_implementation
        if (
            counts is None
            or name != "sdpa"
            or options.get("dropout")
            or (self.mask is None and options.get("is_causal") is not False and self.queries.shape[2] > 1)
            # One call for each length was measured on CPUs alone.
            or (self.queries.device.type != "cpu" and len(set(counts)) > 1)
        ):
            from transformers.models.mllama import modeling_mllama as modeling

            stock = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(name, modeling.eager_attention_forward)
            return cast(Attended, stock(module, self.queries, self.keys, self.values, mask, **options))
        return attend(self.queries, self.keys, self.values, counts, self.scale, bias), None


class _Like:
    """An object that is another one but for these attributes."""

    def __init__(self, other: Any, **attributes: Any) -> None:
        self.__dict__ |= {"_other": other, **attributes}

    def __getattr__(self, name: str) -> Any:
        if name == "_other":  # while it is being copied
            raise AttributeError(name)
        return getattr(self._other, name)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> Attended:
    """What transformers calls in place of the layer's own attention function."""
    step = options.pop(KEYWORD, None)
    call = Call(module, query, key, value, attention_mask, options)
    return call.attend(call.mask) if step is None else cast(Attended, step.attend(call))


class Taken:
    """Cross-attention modules whose attention we carry out, until `give_back()`."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attention)
        self._modules = tuple(modules)
        for module in self._modules:
            # Ours is the implementation. What the module's own config calls so would attend if we did not; it may be
            # set anew at any time, and stock functions look it up.
            as_it_was: Any = _Like(module, config=module.config)
            module.config = cast(Any, _Like(module.config, _attn_implementation=NAME, as_it_was=as_it_was))

    def give_back(self) -> None:
        """Every module reads its own config again; a second call does nothing."""
        for module in self._modules:
            module.config = cast(Any, module.config).as_it_was.config
        self._modules = ()
