"""Read off a running, untrimmed model what its cross-attention layers attend to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from crosstrim.method.choose import Processes
from crosstrim.method.rating import real_rows
from crosstrim.method.saliency import saliency
from crosstrim.models import mllama, parallel
from crosstrim.models.interface import KEYWORD, Attended, Call, Taken


class Watch:
    """Scores the features layer by layer, where each layer attends.

    Args:
        attention_mask: [B, T] with 1 for tokens and 0 for padding, which does not rate.
        tiles: [B, T, images * tiles] bool, what the rows may see.
        ranks: the processes that share the heads, if the model is divided.

    Attributes:
        scores: per watched layer, in the order they ran, [B, Hq, N] float32 as of `crosstrim.saliency`.
        visible: [B, N] bool, the features that some rating row sees.
    """

    def __init__(self, attention_mask: torch.Tensor, tiles: torch.Tensor, ranks: Processes | None = None) -> None:
        self.scores: list[torch.Tensor] = []
        self.visible: torch.Tensor
        self._attention_mask = attention_mask
        self._ranks = ranks
        self._tiles = tiles

    def attend(self, call: Call) -> Attended:
        """Score by what the layer is about to use, and let it attend."""
        visible = self._tiles.to(call.queries.device).repeat_interleave(
            call.keys.shape[2] // self._tiles.shape[2], -1
        )
        rows = real_rows(self._attention_mask, len(visible), visible.shape[1], visible.device)
        scores = saliency(call.queries, call.keys, visible, rating_rows=rows, scale=call.scale)
        if self._ranks is not None:
            scores = self._ranks.gather_heads(scores)
        if not self.scores:
            self.visible = (visible & rows.unsqueeze(-1)).any(1)
        self.scores.append(scores.to(self.visible.device))  # layers may lie on several devices
        return call.attend(call.mask)


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
    tiles = mllama.tiles_seen(inputs["cross_attention_mask"], past=0, rows=attention_mask.shape[1])
    watch = Watch(attention_mask, tiles, parallel.ranks(located))
    taken = Taken(map(mllama.attention_of, layers))
    try:
        located.model(**{**inputs, "position_ids": positions, KEYWORD: watch}, use_cache=False)
    finally:
        taken.give_back()
    return watch
