"""The attention each feature receives, in Triton: scores never reach memory, and q·k is computed twice instead."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

# With TRITON_INTERPRET=1 in the environment when this module is first imported, kernels run on the CPU, in numpy.
INTERPRETED: bool = triton.knobs.runtime.interpret
LOG2_E = 1.4426950408889634


def attention_received(
    queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, rating: torch.Tensor, scale: float
) -> torch.Tensor:
    """What `saliency_torch.attention_received` computes, for float32, bfloat16 and float16.

    The first kernel takes the log-sum-exp of every row, the second sums exp(score - log-sum-exp) down a block of
    features (ours; as FlashAttention-2 does in its backward pass, https://arxiv.org/abs/2307.08691). No atomics:
    each number is one program's, added in the order of the rows, so that runs repeat to the last bit. Sums are
    float32, and float32 inputs are multiplied without TF32. Memory beyond the result: 4 bytes a query row.

    Args:
        queries: [B, Hq, T, D].
        keys: [B, Hkv, N, D], same dtype, Hq a multiple of Hkv.
        visible: [B, T, M] bool, each entry for N // M features that stand together.
        rating: [B, T] bool, rows that count; rows that see nothing never do.
        scale: factor on q·k.

    Returns:
        [B, Hq, N] float32.
    """
    batch, heads, rows, head_size = queries.shape
    features = keys.shape[2]
    result = torch.zeros(batch, heads, features, dtype=torch.float32, device=queries.device)
    if not rows or not result.numel():
        return result
    if INTERPRETED and queries.dtype == torch.bfloat16:  # the interpreter multiplies its bits (triton #11584)
        queries, keys = queries.float(), keys.float()
    row_lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=queries.device)
    visible, rating = (mask.to(queries.device, non_blocking=True) for mask in (visible, rating))
    if visible.shape[2] < features:
        visible = visible.repeat_interleave(features // visible.shape[2], dim=-1)
    inputs = (queries, keys, visible)
    strides = [stride for tensor in inputs for stride in tensor.stride()]
    sizes = (heads, heads // keys.shape[1], rows, features, scale * LOG2_E)  # the kernels take powers of 2
    blocks = block_sizes(head_size, queries.element_size())
    with torch.cuda.device_of(queries):  # does nothing on a CPU
        grid = (batch * heads, triton.cdiv(rows, blocks["BLOCK_ROWS"]))
        _row_log_sum_exp[grid](row_lse, *inputs, rating, *strides, *rating.stride(), *sizes, **blocks)
        grid = (batch * heads, triton.cdiv(features, blocks["BLOCK_FEATURES"]))
        _column_sums[grid](result, row_lse, *inputs, *strides, *sizes, **blocks)
    return result


def block_sizes(head_size: int, number_bytes: int) -> dict[str, int]:
    """What the kernels are compiled for: blocks whose copies in shared memory fit every GPU since Ampere (99 KiB)."""
    block = 64 if number_bytes == 2 else 32
    size = max(16, triton.next_power_of_2(head_size))
    return {"SIZE": head_size, "BLOCK_SIZE": size, "BLOCK_ROWS": block, "BLOCK_FEATURES": block}


@triton.jit
def _load(start, rows, count, row_stride, size_stride, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Vectors `rows` of a [count, SIZE] matrix; zeros below its end, and up to BLOCK_SIZE numbers each."""
    places = tl.arange(0, BLOCK_SIZE)
    inside = (rows[:, None] < count) & (places[None, :] < SIZE)
    return tl.load(start + rows[:, None] * row_stride + places[None, :] * size_stride, mask=inside, other=0.0)


@triton.jit
def _scores(query, key, visible, rows, columns, row_count, feature_count, row_stride, feature_stride, scale):
    """Scores of a block in float32, -inf where the row does not see the feature and beyond the end of either."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < feature_count)
    places = visible + rows[:, None] * row_stride + columns[None, :] * feature_stride
    seen = tl.load(places, mask=inside, other=0) != 0
    return tl.where(seen, tl.dot(query, tl.trans(key), input_precision="ieee") * scale, float("-inf"))


@triton.jit
def _row_log_sum_exp(
    row_lse,
    queries,
    keys,
    visible,
    rating,
    query_sample,
    query_head,
    query_row,
    query_size,
    key_sample,
    key_head,
    key_feature,
    key_size,
    visible_sample,
    visible_row,
    visible_feature,
    rating_sample,
    rating_row,
    heads,
    group,
    row_count,
    feature_count,
    scale,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Base-2 log of the sum of 2 ** score over the features, for a block of rows; inf for rows that do not count."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    queries += sample * query_sample + head * query_head
    keys += sample * key_sample + (head // group) * key_head
    visible += sample * visible_sample
    query = _load(queries, rows, row_count, query_row, query_size, SIZE, BLOCK_SIZE)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, feature_count, BLOCK_FEATURES):
        columns = first + tl.arange(0, BLOCK_FEATURES).to(tl.int64)
        key = _load(keys, columns, feature_count, key_feature, key_size, SIZE, BLOCK_SIZE)
        scores = _scores(
            query, key, visible, rows, columns, row_count, feature_count, visible_row, visible_feature, scale
        )
        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # -inf less -inf would not be a number
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        largest = larger
    counts = tl.load(rating + sample * rating_sample + rows * rating_row, mask=rows < row_count, other=0) != 0
    counts = counts & (largest != float("-inf"))
    lse = tl.where(counts, largest + tl.log2(tl.where(counts, total, 1.0)), float("inf"))
    tl.store(row_lse + tl.program_id(0).to(tl.int64) * row_count + rows, lse, mask=rows < row_count)


@triton.jit
def _column_sums(
    result,
    row_lse,
    queries,
    keys,
    visible,
    query_sample,
    query_head,
    query_row,
    query_size,
    key_sample,
    key_head,
    key_feature,
    key_size,
    visible_sample,
    visible_row,
    visible_feature,
    heads,
    group,
    row_count,
    feature_count,
    scale,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Sum of 2 ** (score - row_lse) over all rows, for a block of features."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    queries += sample * query_sample + head * query_head
    keys += sample * key_sample + (head // group) * key_head
    visible += sample * visible_sample
    row_lse += tl.program_id(0).to(tl.int64) * row_count
    key = _load(keys, columns, feature_count, key_feature, key_size, SIZE, BLOCK_SIZE)
    total = tl.zeros([BLOCK_FEATURES], tl.float32)
    for first in range(0, row_count, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        lse = tl.load(row_lse + rows, mask=rows < row_count, other=float("inf"))
        query = _load(queries, rows, row_count, query_row, query_size, SIZE, BLOCK_SIZE)
        scores = _scores(
            query, key, visible, rows, columns, row_count, feature_count, visible_row, visible_feature, scale
        )
        total += tl.sum(tl.exp2(scores - lse[:, None]), 0)
    tl.store(result + tl.program_id(0).to(tl.int64) * feature_count + columns, total, mask=columns < feature_count)
