"""The Triton kernels on a GPU against the reference in torch, at the shapes of the real layers."""

from __future__ import annotations

import pytest
import torch

import crosstrim
from crosstrim.method.kernels import saliency_torch
from tests.support.gpu import DEVICE, REHEARSAL
from tests.support.kernels import case
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
