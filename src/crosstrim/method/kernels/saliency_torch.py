"""The attention each feature receives, in torch: the reference, and what a CPU runs."""

from __future__ import annotations

from math import prod

import torch

# Scores of one chunk, and as much again for their softmax. Small on a CPU, so that a processor's cache holds them; an
# accelerator waits for the next call more than for memory, so it gets fewer and larger ones.
CHUNK_BYTES = 4 * 2**20
CHUNK_BYTES_ELSEWHERE = 64 * 2**20
# Every chunk reads all keys, so with many images it must not be for one or two rows.
LEAST_ROWS = 8


def attention_received(
    queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, rating: torch.Tensor, scale: float
) -> torch.Tensor:
    """Sum over the rating rows of softmax(scale * q·k) over the visible features, in float32.

    One sample at a time, so that batch mates do not change a sample's numbers. Where the masks are on the CPU, only
    the rating rows and the features that these see are computed. Where they are on a device, the host does not wait
    for it to look into them, and everything is. Memory beyond the result does not grow with T: two chunks, and one
    sample's keys where they are not float32 or partly invisible.

    Args:
        queries: [B, Hq, T, D], any float dtype.
        keys: [B, Hkv, N, D], Hq a multiple of Hkv.
        visible: [B, T, M] bool, each entry for N // M features that stand together.
        rating: [B, T] bool, rows that count; rows that see nothing never do.
        scale: factor on q·k.

    Returns:
        [B, Hq, N] float32.
    """
    result = torch.zeros(*queries.shape[:2], keys.shape[2], dtype=torch.float32, device=queries.device)
    together = torch.arange(keys.shape[2] // max(1, visible.shape[2]), device=keys.device)
    looked_into = visible.device.type == "cpu"
    for sample in range(len(queries)):
        seen = visible[sample]
        rows, columns = (torch.arange(count, device=visible.device) for count in seen.shape)
        counting = rating[sample] & seen.any(-1)
        if looked_into:
            rows = counting.nonzero().squeeze(-1)
            if not len(rows):
                continue
            columns = _seen_by_any(seen, rows)
        places = columns.to(keys.device, non_blocking=True).unsqueeze(-1) * len(together) + together
        places = places.flatten()
        features = keys[sample] if len(places) == keys.shape[2] else keys[sample][:, places]
        parts = None if looked_into else counting.float()
        received = _one_sample(queries[sample], features.float(), seen, rows, columns, parts, scale)
        result[sample].index_copy_(-1, places, received)
    return result


def _seen_by_any(seen: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Indices of what some of the `rows` see; `seen` [T, M] is read chunk by chunk."""
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
    parts: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The attention [Hq, F] that the features of `columns`, whose keys are [Hkv, F, D], receive from `rows`.

    Each row counts by its part in `parts` [T], 0 or 1; None: all count, and the masks may be looked into.
    """
    key_heads, feature_count, head_size = keys.shape
    group = len(queries) // key_heads
    per_row = group * feature_count  # scores, for each key head
    budget = max(LEAST_ROWS, _chunk_bytes(keys.device) // (4 * per_row))
    rows_per_chunk = min(len(rows), budget)
    heads_per_chunk = min(key_heads, budget // rows_per_chunk)
    buffers = torch.empty(2, heads_per_chunk * rows_per_chunk * per_row, dtype=torch.float32, device=keys.device)
    received = torch.zeros(key_heads, group, feature_count, dtype=torch.float32, device=keys.device)
    for chunk in rows.split(rows_per_chunk):
        # The query heads that share a key head stand below each other, so that no key is copied.
        asked = queries[:, chunk.to(queries.device, non_blocking=True)]
        packed = (asked.float() * scale).view(key_heads, group * len(chunk), head_size)
        hidden = ~seen[chunk].index_select(1, columns)
        if parts is None:
            masked = bool(hidden.any())  # mostly all rows see the same features, and there is nothing left to hide
        else:
            masked, hidden = True, hidden & ~hidden.all(-1, keepdim=True)  # a row that is all masked would be NaN
        hidden = hidden.to(keys.device, non_blocking=True) if masked else hidden
        for first in range(0, key_heads, heads_per_chunk):
            heads = slice(first, first + heads_per_chunk)
            shape = (len(keys[heads]), group, len(chunk), feature_count)
            scores, weights = (buffer[: prod(shape)].view(shape) for buffer in buffers)
            torch.bmm(packed[heads], keys[heads].transpose(1, 2), out=scores.flatten(1, 2))
            if masked:
                scores.unflatten(-1, (len(columns), -1)).masked_fill_(hidden.unsqueeze(-1), float("-inf"))
            torch.softmax(scores, -1, out=weights)
            if parts is not None:
                weights *= parts[chunk].unsqueeze(-1)
            received[heads] += weights.sum(2)
    return received.flatten(0, 1)


def _chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_ELSEWHERE
