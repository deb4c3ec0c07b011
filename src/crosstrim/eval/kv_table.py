"""Bytes of image features against text in the KV cache, by batch size and text length: computed, not measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from crosstrim.memory import ModelShape, image_kv_bytes, text_kv_bytes
from crosstrim.method.selection import share_of

BATCHES = (1, 8, 32, 128)
TEXT_TOKENS = (128, 1024, 8192)
"""Prompt and answer together."""


def tiers(shape: ModelShape) -> dict[str, int]:
    """Features that the cache holds of one image; `keep` is of an image that fills all tiles."""
    features = shape.features_per_image
    kept = {f"keep={share}": int(share_of(share, torch.tensor(features, device="cpu"))) for share in (0.5, 0.25)}
    return {"untrimmed": features, "one tile, padding gone": shape.features_per_tile, **kept}


def compute(shape: ModelShape) -> dict[str, Any]:
    """The table, for one image a sample, as plain JSON types.

    Args:
        shape: of the model.

    Returns:
        `shape`; `features` of one image in each tier; `rows`, each with `batch`, `text_tokens` of every sample,
        `text_bytes`, `image_bytes` of each tier, and `ratio` of image to text bytes of each tier, which the batch
        does not change.
    """
    features = tiers(shape)
    rows = []
    for batch in BATCHES:
        for tokens in TEXT_TOKENS:
            text = text_kv_bytes(shape, batch * tokens)
            image = {tier: image_kv_bytes(shape, batch * count) for tier, count in features.items()}
            ratio = {tier: round(size / text, 4) for tier, size in image.items()}
            row = {"batch": batch, "text_tokens": tokens, "text_bytes": text, "image_bytes": image, "ratio": ratio}
            rows.append(row)
    return {"shape": asdict(shape), "features": features, "rows": rows}
