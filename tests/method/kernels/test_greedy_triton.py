"""The greedy Triton kernels on a CPU: interpreted against torch (TRITON_INTERPRET=1), or compiled for GPUs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosstrim.method import policies
from crosstrim.method.kernels import greedy_torch
from tests.support.evidence import evidence
from tests.support.kernels import greedy_case, taken_by_loops

triton = pytest.importorskip("triton", reason="make test-kernels installs Triton")

from crosstrim.method.kernels import greedy_triton  # noqa: E402

interpreted = pytest.mark.skipif(not greedy_triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(greedy_triton.INTERPRETED, reason="needs Triton's compiler")


@interpreted
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 140), st.integers(1, 12), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_least_alike_equals_torch_ties_included(seed, size, steps, weight):
    gain, unit = greedy_case(seed, images=3, size=size)
    got = greedy_triton.marginal_relevance(gain, unit, weight, steps)
    assert torch.equal(got, greedy_torch.marginal_relevance(gain, unit, weight, steps))
    assert torch.equal(got, taken_by_loops(gain, unit, weight, steps))


@interpreted
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 140), st.integers(1, 12))
def test_least_explained_equals_torch(seed, size, steps):
    generator = torch.Generator().manual_seed(seed)
    quality = torch.rand(2, size, generator=generator) + 0.1
    unit = torch.nn.functional.normalize(torch.randn(2, size, 16, generator=generator), dim=-1)
    variance = quality.square()
    variance[1, size // 2 + 1 :] = -torch.inf
    inputs = (quality, variance, unit, 0.3, min(steps, size // 2 + 1))
    assert torch.equal(greedy_triton.determinantal(*inputs), greedy_torch.determinantal(*inputs))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["contribution", "mmr", "dpp"])
def test_policies_vote_alike_for_ragged_budgets_of_several_images(name, dtype, monkeypatch):
    one = evidence(seed=4, images=2, budget=7, dtype=dtype)
    one.budget[0, 0], one.budget[1, 1] = 2, 11
    expected = policies.resolve(name)(one)
    monkeypatch.setenv("CROSSTRIM_KERNEL", "triton")
    assert torch.equal(policies.resolve(name)(one), expected)


@interpreted
def test_an_image_of_the_11b_model():
    gain, unit = greedy_case(0, images=1, size=6404, dimensions=64)
    got = greedy_triton.marginal_relevance(gain, unit, 0.5, 20)
    assert torch.equal(got, greedy_torch.marginal_relevance(gain, unit, 0.5, 20))


@compiled
@pytest.mark.parametrize("kernel", ["_take_least_alike", "_take_least_explained"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", [100, 2560, 6404])
def test_compiles_for_gpus_and_keeps_its_numbers_on_the_chip(kernel, capability, size):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, launch = getattr(greedy_triton, kernel), greedy_triton.launch(size)
    constants = {"BLOCK": launch["BLOCK"]}
    types = {"taken": "*i64", "rows": "*fp32", "first": "*fp32", "left": "*fp32", "alike": "*fp32"}
    types |= {"size": "i32", "steps": "i32", "BLOCK": "constexpr"}
    signature = {name: types[name] for name in function.arg_names}
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": launch["num_warps"]}
    binary = triton.compile(ASTSource(function, signature, constants), target=target, options=options)
    assert binary.metadata.shared <= 99 * 1024
    assert "st.local" not in binary.asm["ptx"]  # nothing is spilled to memory by the compiler
