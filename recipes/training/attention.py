"""Attention for training only: many questions about one picture in one row, the picture's keys made once.

A row is a prefix that all questions share (the chat header and the image token) and then segments of equal length,
one question and its answer each. A segment sees the prefix and itself, so each is exactly the prompt that the
finished model will see. Matrices are multiplied whole, which on CPUs is faster than a fused kernel here.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "mini_training"


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return softmax(q k) v of shape [B, rows, heads, D]; the heads that share a key head are stacked as rows."""
    batch, heads, rows, size = query.shape
    shared = heads // key.shape[1]
    stacked = (query * scaling).reshape(batch, key.shape[1], shared * rows, size)
    scores = stacked @ key.transpose(2, 3)
    if mask is not None:
        scores = scores + (mask if mask.shape[-2] == 1 else mask.repeat(1, 1, shared, 1)).to(scores.dtype)
    mixed = torch.softmax(scores, dim=-1) @ value
    return mixed.reshape(batch, heads, rows, size).transpose(1, 2)


@cache
def _causal(rows: int, columns: int) -> Tensor:
    blocked = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
    return torch.zeros(rows, columns).masked_fill(blocked, -1e4)[None, None]


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, scaling: float, prefix: int, segment: int) -> Tensor:
    """Attend causally within the prefix, and from each segment to the prefix and itself."""
    batch, _, rows, size = query.shape
    count = (rows - prefix) // segment

    def cut(states: Tensor) -> Tensor:
        heads = states.shape[1]
        cuts = states[:, :, prefix:].reshape(batch, heads, count, segment, size).transpose(1, 2)
        return cuts.reshape(batch * count, heads, segment, size)

    def with_prefix(states: Tensor) -> Tensor:
        shared = states[:, None, :, :prefix].expand(-1, count, -1, -1, -1).flatten(0, 1)
        return torch.cat([shared, cut(states)], dim=2)

    first = _attend(query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], _causal(prefix, prefix), scaling)
    later = _attend(cut(query), with_prefix(key), with_prefix(value), _causal(segment, prefix + segment), scaling)
    return torch.cat([first, later.reshape(batch, count * segment, *first.shape[2:])], dim=1)


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    prefix: int = 0,
    segment: int = 0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention in transformers' interface; `prefix` and `segment` arrive through the model's keyword arguments."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast("cpu", enabled=False):
        if segment and getattr(module, "is_causal", False):
            return _attend_packed(query, key, value, scaling, prefix, segment), None
        return _attend(query, key, value, attention_mask, scaling), None


AttentionInterface.register(NAME, training_attention)
