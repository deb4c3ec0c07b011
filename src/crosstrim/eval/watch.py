"""Read off a running, untrimmed model what its cross-attention layers attend to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from crosstrim.forward import visible_features
from crosstrim.models import mllama, parallel
from crosstrim.rating import saliency
from crosstrim.rows import real_rows


class Watch:
    """Scores the features layer by layer, holding one layer's queries and keys at a time.

    Args:
        attention_mask: [B, T] with 1 for tokens and 0 for padding, which does not rate.
        ranks: the processes that share the heads, if the model is divided.

    Attributes:
        scores: per watched layer, in the order they ran, [B, Hq, N] float32 as of `crosstrim.saliency`.
        visible: [B, N] bool, the features that some rating row sees.
    """

    def __init__(self, attention_mask: torch.Tensor, ranks: parallel.Ranks | None = None) -> None:
        self.scores: list[torch.Tensor] = []
        self.visible: torch.Tensor
        self._attention_mask = attention_mask
        self._ranks = ranks
        self._seen: dict[str, torch.Tensor] = {}

    def see(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Hold the queries or keys of the layer that is running."""
        self._seen[name] = output

    def score(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a layer: score by what it just used."""
        queries, keys = self._seen.pop("queries"), self._seen.pop("keys")
        hidden_states = args[0] if args else kwargs["hidden_states"]
        visible = visible_features(
            kwargs.get("cross_attention_mask"),
            kwargs.get("full_text_row_masked_out_mask"),
            hidden_states,
            keys.shape[2],
        )
        rows = real_rows(self._attention_mask, len(visible), visible.shape[1], visible.device)
        scores = saliency(queries, keys, visible, rating_rows=rows, scale=mllama.attention_scale(layer))
        if self._ranks is not None:
            scores = self._ranks.gather_heads(scores)
        if not self.scores:
            self.visible = (visible & rows.unsqueeze(-1)).any(1)
        self.scores.append(scores.to(self.visible.device))  # layers may lie on several devices


@torch.no_grad()
def run(located: mllama.Mllama, layers: Sequence[nn.Module], inputs: Mapping[str, torch.Tensor]) -> Watch:
    """Run the model once, without a cache, and score the features by the attention of `layers`.

    Args:
        located: the model's parts; it is not trimmed.
        layers: cross-attention layers of it.
        inputs: of the processor; rows may be padded on either side.
    """
    attention_mask = inputs["attention_mask"]
    positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
    watch, hooks = Watch(attention_mask, parallel.ranks(located)), []
    for layer in layers:
        queries, keys, _ = mllama.attention_inputs(layer)
        hooks += [
            queries.register_forward_hook(partial(watch.see, "queries")),
            keys.register_forward_hook(partial(watch.see, "keys")),
            layer.register_forward_hook(watch.score, with_kwargs=True),
        ]
    try:
        located.model(**{**inputs, "position_ids": positions}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return watch
