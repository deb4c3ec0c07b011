"""What the later layers really attend to: the upper reference for policies, which know the first layer only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from crosstrim.forward import visible_features
from crosstrim.models import mllama
from crosstrim.rows import real_rows
from crosstrim.saliency import saliency


@torch.no_grad()
def votes(model: Any, inputs: Mapping[str, torch.Tensor], answers: torch.Tensor) -> torch.Tensor:
    """Score features by the attention that every later cross-attention layer pays them, prompt and answer together.

    It reads the untrimmed model's own answer, so it needs a second pass and cannot be had in practice.

    Args:
        model: a loaded Mllama, not trimmed.
        inputs: of the processor, padded on the left.
        answers: [B, S] the tokens that the model generated for them, end of text and padding included.

    Returns:
        [B, 1, N] float32: one voter, the mean over the layers after the first one and their query heads.
    """
    said = _said(model, answers)
    mask = inputs["cross_attention_mask"]
    attention_mask = torch.cat([inputs["attention_mask"], said.long()], dim=1)
    inputs = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], answers], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0),
        "cross_attention_mask": torch.cat([mask, mask[:, -1:].expand(-1, answers.shape[1], -1, -1)], dim=1),
    }
    located = mllama.locate(model)
    with _watched(located, attention_mask) as watch:
        located.model(**inputs, use_cache=False)
    return torch.stack(watch.scores).mean(0)


def _said(model: Any, answers: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: the tokens before the end of text."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return torch.ones_like(answers, dtype=torch.bool)
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device))
    return ended.cumsum(1) == 0


class _Watch:
    """Scores the features layer by layer, holding one layer's queries and keys at a time."""

    def __init__(self, attention_mask: torch.Tensor) -> None:
        self.scores: list[torch.Tensor] = []
        self._attention_mask = attention_mask
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
        first = self.scores[0].device if self.scores else scores.device  # layers may lie on several devices
        self.scores.append(scores.mean(1, keepdim=True).to(first))


@contextlib.contextmanager
def _watched(located: mllama.Mllama, attention_mask: torch.Tensor) -> Iterator[_Watch]:
    watch = _Watch(attention_mask)
    hooks = []
    for layer in located.followers:
        queries, keys, _ = mllama.attention_inputs(layer)
        hooks += [
            queries.register_forward_hook(partial(watch.see, "queries")),
            keys.register_forward_hook(partial(watch.see, "keys")),
            layer.register_forward_hook(watch.score, with_kwargs=True),
        ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
