"""The attention each feature receives, in torch: the reference, and what a CPU runs."""

from __future__ import annotations

from math import prod

import torch

# Scores of one chunk, and as much again for their softmax. Small on a CPU, so that a processor's cache holds them; an
# accelerator waits for the next call more than for memory, so it gets fewer and larger ones.
CHUNK_BYTES = 4 * 2**20
CHUNK_BYTES_ELSEWHERE = 64 * 2**20


def attention_received(
    queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, rating: torch.Tensor, scale: float
) -> torch.Tensor:
    """Sum over the rating rows of softmax(scale * q·k) over the visible features, in float32.

    Only a sample's rating rows and the features that these see are computed, one sample at a time, so that neither
    batch mates nor padding change a sample's numbers. Memory beyond the result does not grow with T: two chunks,
    and one sample's keys where they are not float32 or partly invisible.

    Args:
        queries: [B, Hq, T, D], any float dtype.
        keys: [B, Hkv, N, D], Hq a multiple of Hkv.
        visible: [B, T, N] bool.
        rating: [B, T] bool, rows that count; rows that see nothing never do.
        scale: factor on q·k.

    Returns:
        [B, Hq, N] float32.
    """
    result = torch.zeros(*queries.shape[:2], keys.shape[2], dtype=torch.float32, device=queries.device)
    for sample in range(len(queries)):
        seen = visible[sample]
        rows = (rating[sample] & seen.any(-1)).nonzero().squeeze(-1)
        if not len(rows):
            continue
        columns = _seen_by_any(seen, rows)
        features = keys[sample] if len(columns) == keys.shape[2] else keys[sample][:, columns]
        received = _one_sample(queries[sample], features.float(), seen, rows, columns, scale)
        result[sample].index_copy_(-1, columns, received)
    return result


def _seen_by_any(seen: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Indices [M] of the features that some of the `rows` see; `seen` [T, N] is read chunk by chunk."""
    union = torch.zeros(seen.shape[1], dtype=torch.bool, device=seen.device)
    for chunk in rows.split(max(1, _chunk_bytes(seen.device) // (4 * seen.shape[1]))):
        union |= seen[chunk].any(0)
    return union.nonzero().squeeze(-1)


def _one_sample(
    queries: torch.Tensor,
    keys: torch.Tensor,
    seen: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The attention [Hq, M] that the features `columns`, whose keys are [Hkv, M, D], receive from `rows`."""
    key_heads, feature_count, head_size = keys.shape
    group = len(queries) // key_heads
    per_row = group * feature_count  # scores, for each key head
    budget = max(1, _chunk_bytes(keys.device) // (4 * per_row))
    rows_per_chunk = min(len(rows), budget)
    heads_per_chunk = min(key_heads, budget // rows_per_chunk)
    buffers = torch.empty(2, heads_per_chunk * rows_per_chunk * per_row, dtype=torch.float32, device=keys.device)
    received = torch.zeros(key_heads, group, feature_count, dtype=torch.float32, device=keys.device)
    for chunk in rows.split(rows_per_chunk):
        # The query heads that share a key head stand below each other, so that no key is copied.
        packed = (queries[:, chunk].float() * scale).view(key_heads, group * len(chunk), head_size)
        hidden = ~seen[chunk].index_select(1, columns)
        masked = bool(hidden.any())  # mostly all rows see the same features, and there is nothing left to hide
        for first in range(0, key_heads, heads_per_chunk):
            heads = slice(first, first + heads_per_chunk)
            shape = (len(keys[heads]), group, len(chunk), feature_count)
            scores, weights = (buffer[: prod(shape)].view(shape) for buffer in buffers)
            torch.bmm(packed[heads], keys[heads].transpose(1, 2), out=scores.flatten(1, 2))
            if masked:
                scores.masked_fill_(hidden, float("-inf"))
            torch.softmax(scores, -1, out=weights)
            received[heads] += weights.sum(2)
    return received.flatten(0, 1)


def _chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_ELSEWHERE
