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


def greedy_case(seed, images, size, dimensions=16):
    """Gains [R, P], of which each image may take fewer, and unit vectors; many of both are equal.

    All are multiples of a power of two, so that products and sums are exact in whatever order they are taken.
    """
    generator = torch.Generator().manual_seed(seed)
    gain = torch.randint(0, 8, (images, size), generator=generator) / 8
    for image in range(images):
        gain[image, size - min(image * 2, size - 1) :] = -torch.inf
    signs = torch.randint(0, 2, (images, size, dimensions), generator=generator) * 2 - 1
    return gain, signs / dimensions**0.5


def taken_by_loops(gain, unit, weight, steps):
    """Places by the rule of maximal marginal relevance; 0 where there are no more."""
    taken = torch.zeros(len(gain), steps, dtype=torch.long)
    for image, (gains, vectors) in enumerate(zip(gain.tolist(), unit.double(), strict=True)):
        cosine = (vectors @ vectors.T).tolist()
        left = [place for place, value in enumerate(gains) if value != -torch.inf]
        for step in range(min(steps, len(left))):
            before = taken[image, :step].tolist()
            score = {
                place: gains[place] - weight * max((cosine[place][one] for one in before), default=-1.0)
                for place in left
            }
            best = max(left, key=lambda place: score[place])
            taken[image, step] = best
            left.remove(best)
    return taken
