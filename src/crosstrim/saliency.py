"""How much attention the text pays to each image feature, without ever holding the whole attention map."""

from __future__ import annotations

import torch

from crosstrim.errors import InputError

# Scores of one chunk of text rows; the softmax makes a second tensor of the same size.
CHUNK_BYTES = 16 * 2**20


def saliency(
    queries: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    *,
    rating_rows: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Sum over text rows of the softmax attention each image feature receives, per query head.

    The score is a sum over the rating rows and the softmax runs over the visible features (ours; the paper says
    only that the text's attention in the first cross-attention layer scores the features, head by head).
    One sample is computed at a time and its non-rating rows are left out before the arithmetic, so that
    neither batch mates nor padding change a sample's numbers.

    Args:
        queries: [B, Hq, T, D], any float dtype, as the layer makes them (after its query norm).
        keys: [B, Hkv, N, D], same dtype, Hq a multiple of Hkv. Query head h reads key head h * Hkv // Hq.
        visible: [B, T, N] bool, whether the text row may see the feature.
        rating_rows: [B, T] bool, rows that count; rows that see nothing never do. None: all.
        scale: factor on q·k before the softmax; None: D ** -0.5.

    Returns:
        [B, Hq, N] float32. A sample without rating rows gets zeros, invisible features get zero.

    Raises:
        InputError: shapes or dtypes do not fit together.
    """
    _check(queries, keys, visible, rating_rows)
    batch, query_heads, _, head_size = queries.shape
    scale = head_size**-0.5 if scale is None else scale
    rating = visible.any(-1) if rating_rows is None else rating_rows & visible.any(-1)
    result = torch.zeros(batch, query_heads, keys.shape[2], dtype=torch.float32, device=queries.device)
    if result.is_meta:  # shapes without values: there are no rows to tell apart
        return result
    for sample in range(batch):
        rows = rating[sample].nonzero().squeeze(-1)
        rows_per_chunk = max(1, CHUNK_BYTES // (4 * result[sample].numel()))
        transposed_keys = keys[sample].float().transpose(-1, -2)
        for chunk in rows.split(rows_per_chunk):
            _add_attention(result[sample], queries[sample], transposed_keys, visible[sample], chunk, scale)
    return result


def _add_attention(
    total: torch.Tensor,
    queries: torch.Tensor,
    transposed_keys: torch.Tensor,
    visible: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
) -> None:
    """Add the attention of the text rows `rows` to `total` [Hq, N] in place."""
    key_heads, _, feature_count = transposed_keys.shape
    # The query heads that share a key head stand below each other, so that no key is copied.
    grouped = queries[:, rows].float().reshape(key_heads, -1, queries.shape[-1])
    scores = (grouped @ transposed_keys).mul_(scale).view(len(queries), len(rows), feature_count)
    scores.masked_fill_(~visible[rows], float("-inf"))
    total += scores.softmax(-1).sum(-2)


def _check(
    queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, rating_rows: torch.Tensor | None
) -> None:
    if queries.dim() != 4 or keys.dim() != 4:
        raise InputError(
            f"queries {tuple(queries.shape)} must be [B, Hq, T, D] and keys {tuple(keys.shape)} [B, Hkv, N, D]."
        )
    batch, query_heads, rows, head_size = queries.shape
    if keys.shape[0] != batch or keys.shape[3] != head_size or query_heads % keys.shape[1]:
        raise InputError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} do not fit: B and D must agree "
            "and Hq must be a multiple of Hkv."
        )
    if not queries.is_floating_point() or not keys.is_floating_point():
        raise InputError(f"queries ({queries.dtype}) and keys ({keys.dtype}) must be floating point.")
    expected = (batch, rows, keys.shape[2])
    if tuple(visible.shape) != expected or visible.dtype != torch.bool:
        raise InputError(f"visible must be bool of shape {expected}, got {visible.dtype} {tuple(visible.shape)}.")
    if rating_rows is not None and (tuple(rating_rows.shape) != expected[:2] or rating_rows.dtype != torch.bool):
        raise InputError(
            f"rating_rows must be bool of shape {expected[:2]}, got {rating_rows.dtype} {tuple(rating_rows.shape)}."
        )
