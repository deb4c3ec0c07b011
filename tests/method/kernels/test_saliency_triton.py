"""The Triton kernels on a CPU: interpreted against float64 (TRITON_INTERPRET=1), or compiled for GPUs (without)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosstrim
from crosstrim.errors import ConfigError
from crosstrim.method.kernels import saliency_torch
from tests.support.kernels import case
from tests.support.oracle import saliency_by_loops

triton = pytest.importorskip("triton", reason="make test-kernels installs Triton")

from crosstrim.method.kernels import saliency_triton  # noqa: E402

interpreted = pytest.mark.skipif(not saliency_triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(saliency_triton.INTERPRETED, reason="needs Triton's compiler")
HALF = [torch.float16, torch.bfloat16]


def check(case):
    got = saliency_triton.attention_received(*case)
    assert got.dtype == torch.float32
    # Products of halves are exact in float32, so that one tolerance serves every dtype.
    torch.testing.assert_close(got.double(), saliency_by_loops(*case), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, saliency_torch.attention_received(*case), atol=1e-5, rtol=1e-5)
    assert torch.equal(got, saliency_triton.attention_received(*case))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 2, 64, 128, 16),  # whole blocks
        (2, 4, 2, 65, 129, 16),  # one more of each
        (1, 6, 2, 33, 31, 24),  # a head that is no power of two, below a block
        (3, 4, 1, 5, 11, 8),  # a head below the smallest block
        (1, 2, 2, 1, 1, 128),
        (1, 2, 1, 3, 1601, 64),  # a tile
    ],
)
def test_equals_the_loops_at_odd_shapes(shape, dtype):
    check(case(0, *shape, dtype=dtype))


@interpreted
@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(1, 1), (4, 2), (6, 3)]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from([torch.float32, *HALF]),
)
def test_equals_the_loops(seed, heads, rows, features, size, dtype):
    check(case(seed, 1, *heads, rows, features, size, dtype))


@interpreted
def test_an_image_of_the_11b_model():
    queries, keys, visible, rating, scale = case(0, 1, 2, 1, 3, 6404, 128)
    check((queries, keys, visible[:, :1, :].expand(-1, 3, -1) | True, rating | True, scale))


@interpreted
def test_the_public_function_runs_it_when_told(monkeypatch):
    queries, keys, visible, rating, scale = case(0, 2, 4, 2, 5, 11, 8)
    monkeypatch.setenv("CROSSTRIM_KERNEL", "triton")
    got = crosstrim.saliency(queries, keys, visible, rating_rows=rating, scale=scale)
    assert torch.equal(got, saliency_triton.attention_received(queries, keys, visible, rating, scale))


@compiled
def test_the_public_function_refuses_tensors_on_a_cpu(monkeypatch):
    queries, keys, visible, rating, _ = case(0, 2, 4, 2, 5, 11, 8)
    monkeypatch.setenv("CROSSTRIM_KERNEL", "triton")
    with pytest.raises(ConfigError, match="needs tensors on a GPU"):
        crosstrim.saliency(queries, keys, visible, rating_rows=rating)


@interpreted
def test_far_scores_and_blind_blocks():
    """A row's first block is invisible, scores differ by thousands, and nothing overflows."""
    queries, keys, visible, rating, _ = case(0, 1, 2, 2, 5, 150, 16)
    visible[:, 1:, :64] = False
    check((queries, keys, visible, rating, 300.0))


@interpreted
@pytest.mark.parametrize("shape", [(1, 2, 1, 0, 5, 16), (1, 2, 1, 5, 0, 16)])
def test_nothing_to_compute(shape):
    queries, keys = torch.rand(1, 2, shape[3], 16), torch.rand(1, 1, shape[4], 16)
    visible, rating = torch.ones(1, *shape[3:5], dtype=torch.bool), torch.ones(1, shape[3], dtype=torch.bool)
    got = saliency_triton.attention_received(queries, keys, visible, rating, 1.0)
    assert got.shape == (1, 2, shape[4])
    assert not got.any()


@compiled
@pytest.mark.parametrize("kernel", ["_row_log_sum_exp", "_column_sums"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", [24, 128])
def test_compiles_for_gpus_and_fits_their_shared_memory(kernel, dtype, capability, size):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(saliency_triton, kernel)
    blocks = saliency_triton.block_sizes(size, 4 if dtype == "fp32" else 2)
    types = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(blocks, "constexpr") | {"scale": "fp32"}
    types |= {"queries": f"*{dtype}", "keys": f"*{dtype}", "visible": "*i1", "rating": "*i1"}
    types |= {"row_lse": "*fp32", "result": "*fp32"}
    signature = {name: types[name] for name in function.arg_names}
    binary = triton.compile(ASTSource(function, signature, blocks), target=GPUTarget("cuda", capability, 32))
    assert binary.metadata.shared <= 99 * 1024
    assert "atom." not in binary.asm["ptx"]
    assert "tf32" not in binary.asm["ptx"]
    assert dtype == "fp32" or "mma" in binary.asm["ptx"]  # tensor cores
