"""The Triton kernels on a GPU against the reference in torch, at the shapes of the real layers; and who waits."""

from __future__ import annotations

import pytest
import torch

import crosstrim
from crosstrim.method.kernels import greedy_torch, saliency_torch
from tests.support.gpu import DEVICE, REHEARSAL
from tests.support.kernels import case, greedy_case
from tests.support.oracle import saliency_by_loops

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(REHEARSAL, reason="make test-kernels interprets them on a CPU")
SHAPES = {
    "odd": (2, 6, 2, 33, 31, 24),
    "a tile": (1, 4, 2, 65, 1601, 64),
    "11B": (1, 32, 8, 64, 6404, 128),
    "90B": (1, 64, 8, 64, 6404, 128),
}


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_equal_the_reference(name, low):
    from crosstrim.method.kernels import saliency_triton

    queries, keys, visible, rating, scale = case(0, *SHAPES[name], dtype=low)
    moved = [one.to(DEVICE) for one in (queries, keys, visible, rating)]
    got = saliency_triton.attention_received(*moved, scale)
    reference = saliency_torch.attention_received(*moved, scale)
    torch.testing.assert_close(got, reference, atol=1e-4, rtol=1e-4)
    if name == "odd":
        loops = saliency_by_loops(queries, keys, visible, rating, scale)
        torch.testing.assert_close(got.cpu().double(), loops, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reference.cpu().double(), loops, atol=1e-4, rtol=1e-4)
    assert torch.equal(got, saliency_triton.attention_received(*moved, scale))


def test_the_public_function_runs_them_when_told(monkeypatch):
    queries, keys, visible, rating, scale = (
        one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in case(0, 2, 4, 2, 5, 200, 64)
    )
    expected = crosstrim.saliency(queries, keys, visible, rating_rows=rating, scale=scale)
    monkeypatch.setenv("CROSSTRIM_KERNEL", "triton")
    got = crosstrim.saliency(queries, keys, visible, rating_rows=rating, scale=scale)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("images", "size", "steps"), [(3, 100, 30), (2, 2560, 640), (1, 6404, 3202)])
def test_the_greedy_kernel_takes_what_torch_takes_ties_included(images, size, steps):
    from crosstrim.method.kernels import greedy_triton

    gain, unit = greedy_case(0, images, size, dimensions=64)
    expected = greedy_torch.marginal_relevance(gain, unit, 0.5, steps)
    moved = gain.to(DEVICE), unit.to(DEVICE), 0.5, steps
    assert torch.equal(greedy_torch.marginal_relevance(*moved).cpu(), expected)
    assert torch.equal(greedy_triton.marginal_relevance(*moved).cpu(), expected)


@pytest.mark.parametrize(("size", "steps"), [(100, 30), (2560, 640)])
def test_the_kernel_of_dpp_takes_what_torch_takes(size, steps):
    from crosstrim.method.kernels import greedy_triton

    generator = torch.Generator().manual_seed(0)
    quality = torch.rand(2, size, generator=generator) + 0.1
    unit = torch.nn.functional.normalize(torch.randn(2, size, 64, generator=generator), dim=-1)
    moved = quality.to(DEVICE), quality.square().to(DEVICE), unit.to(DEVICE), 0.3, steps
    reference = greedy_torch.determinantal(*moved).cpu()
    got = greedy_triton.determinantal(*moved).cpu()
    for image in range(2):  # sums run in another order: near the end two features may change places
        same = set(got[image].tolist()) & set(reference[image].tolist())
        assert len(same) >= 0.99 * steps
    assert torch.equal(got[:, : steps // 2], reference[:, : steps // 2])
