"""Attention of text rows to image features without a mask, the query heads of a group packed into rows."""

from __future__ import annotations

from itertools import groupby

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    counts: tuple[int, ...],
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every text row attends to the first `counts[b]` features of its sample.

    Query heads that share a key head become rows of one attention, so that keys are read once and never repeated.
    Neighbouring samples that read equally many features share a call; the others cost what they read themselves,
    and not what their longest batch mate does. Ours.

    Args:
        queries: [B, Hq, T, D].
        keys: [B, Hkv, N, D], same dtype, Hq a multiple of Hkv. Query head h reads key head h * Hkv // Hq.
        values: [B, Hkv, N, D].
        counts: features of each sample, 1 to N.
        scale: factor on q·k before the softmax.
        bias: [B, N], same dtype, added to the logits of each feature in every row; None: nothing.

    Returns:
        [B, T, Hq * D], the heads in their order.
    """
    batch, heads, rows, head_size = queries.shape
    packed = queries.reshape(batch, keys.shape[1], -1, head_size)
    outputs, start = [], 0
    for count, run in groupby(counts):
        end = start + len(list(run))
        some = slice(start, end)
        added = None if bias is None else bias[some, None, None, :count]
        outputs.append(
            scaled_dot_product_attention(
                packed[some], keys[some, :, :count], values[some, :, :count], added, is_causal=False, scale=scale
            )
        )
        start = end
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.reshape(batch, heads, rows, head_size).transpose(1, 2).reshape(batch, rows, heads * head_size)
