"""Muon in float32 takes the steps of torch's own, which multiplies in bfloat16."""

from __future__ import annotations

import torch
from recipes.training.muon import Float32Muon


def test_steps_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((24, 40), (40, 24), (32, 32))]
    gradients = [[torch.randn(one.shape, generator=generator) for one in start] for _ in range(3)]

    def after(kind: type[torch.optim.Muon]) -> list[torch.Tensor]:
        matrices = [torch.nn.Parameter(one.clone()) for one in start]
        optimizer = kind(matrices, lr=0.1, weight_decay=0.5)
        for step in gradients:
            for matrix, gradient in zip(matrices, step, strict=True):
                matrix.grad = gradient.clone()
            optimizer.step()
        return [matrix.detach() for matrix in matrices]

    for ours, theirs, before in zip(after(Float32Muon), after(torch.optim.Muon), start, strict=True):
        moved = (theirs - before).abs().mean()
        assert (ours - theirs).abs().mean() < 0.02 * moved
        assert (ours - theirs).abs().max() < 0.2 * moved
