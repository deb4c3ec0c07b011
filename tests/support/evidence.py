"""What a policy goes by, at random."""

from __future__ import annotations

import torch

from crosstrim.method.policies import Evidence

TILE, IMAGE = 17, 34


def evidence(
    seed=0, batch=2, heads=4, key_heads=2, images=1, size=8, budget=6, image=IMAGE, tile=TILE, dtype=torch.float32
):
    generator = torch.Generator().manual_seed(seed)
    count = images * image
    saliency = torch.rand(batch, heads, count, generator=generator) ** 3
    visible = torch.rand(batch, count, generator=generator) < 0.8
    visible[:, :1] = True
    return Evidence(
        saliency=saliency * visible.unsqueeze(1),
        visible=visible,
        keys=torch.randn(batch, key_heads, count, size, generator=generator).to(dtype),
        values=torch.randn(batch, key_heads, count, size, generator=generator).to(dtype),
        budget=torch.full((batch, images), budget),
        features_per_image=image,
        features_per_tile=tile,
    )
