"""How much attention the text pays to each image feature, without ever holding the whole attention map."""

from __future__ import annotations

import torch

from crosstrim.errors import InputError
from crosstrim.method.kernels.saliency import kernel_for
from crosstrim.method.precision import full_precision


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
    Neither batch mates nor padding change a sample's numbers. The environment variable CROSSTRIM_KERNEL picks the
    code that computes it, see `crosstrim.method.kernels`. No gradient flows through it.

    Args:
        queries: [B, Hq, T, D], any float dtype, as the layer makes them (after its query norm).
        keys: [B, Hkv, N, D], same dtype, Hq a multiple of Hkv. Query head h reads key head h * Hkv // Hq.
        visible: [B, T, N] bool, whether the text row may see the feature; or [B, T, M], M a divisor of N, where N / M
            features that stand together, such as a tile's, are seen together. This and `rating_rows` may be on the
            CPU while the queries are on a device: then the host does not wait for the device.
        rating_rows: [B, T] bool, rows that count; rows that see nothing never do. None: all.
        scale: factor on q·k before the softmax; None: D ** -0.5.

    Returns:
        [B, Hq, N] float32. A sample without rating rows gets zeros, invisible features get zero.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        ConfigError: CROSSTRIM_KERNEL has a bad value; what it asks for cannot run on these tensors.
        MissingExtraError: CROSSTRIM_KERNEL asks for Triton, which is not installed.
    """
    _check(queries, keys, visible, rating_rows)
    if queries.is_meta:  # shapes without values: there are no rows to tell apart
        return torch.zeros(*queries.shape[:2], keys.shape[2], dtype=torch.float32, device="meta")
    rating = visible.new_ones(visible.shape[:2]) if rating_rows is None else rating_rows
    scale = queries.shape[3] ** -0.5 if scale is None else scale
    with full_precision(queries.device):
        return kernel_for(queries)(queries.detach(), keys.detach(), visible, rating, scale)


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
    entries = visible.shape[-1] if visible.dim() == 3 else 0
    divides = entries == expected[2] or (entries > 0 and expected[2] % entries == 0)
    if tuple(visible.shape[:2]) != expected[:2] or not divides or visible.dtype != torch.bool:
        raise InputError(
            f"visible must be bool of shape {expected}, or with a divisor of {expected[2]} as its last size, got "
            f"{visible.dtype} {tuple(visible.shape)}."
        )
    if visible.device not in (queries.device, torch.device("cpu")):
        raise InputError(
            f"visible is on {visible.device}; it must be on the CPU or, as queries, on {queries.device}."
        )
    if rating_rows is not None and (tuple(rating_rows.shape) != expected[:2] or rating_rows.dtype != torch.bool):
        raise InputError(
            f"rating_rows must be bool of shape {expected[:2]}, got {rating_rows.dtype} {tuple(rating_rows.shape)}."
        )
