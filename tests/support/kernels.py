"""What a saliency kernel is asked."""

from __future__ import annotations

import torch


def case(seed, batch, heads, key_heads, rows, features, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # Laid out as a layer makes them: [B, T, H, D], seen as [B, H, T, D].
    queries = torch.randn(batch, rows, heads, size, generator=generator).mul(2).to(dtype).transpose(1, 2)
    keys = torch.randn(batch, features, key_heads, size, generator=generator).to(dtype).transpose(1, 2)
    visible = torch.rand(batch, rows, features, generator=generator) < 0.7
    visible[0, 0] = False  # a row before the image
    rating = torch.rand(batch, rows, generator=generator) < 0.8
    return queries, keys, visible, rating, 0.3
