"""Eight bits per number: how far off, and that moving rows about moves nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosstrim.method.quantisation import KV_DTYPES, Quantised


def numbers(dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(0)
    # Every head and feature has its own size, and one outlier.
    spread = torch.rand(2, 4, 50, 1, generator=generator) * 10
    tensor = torch.randn(2, 4, 50, 24, generator=generator) * spread
    tensor[..., 3] *= 20
    return (tensor * size).to(dtype)


def allowed(tensor, packed, kv_dtype):
    """What rounding to the nearest code can do, from the formats' definitions."""
    scales = packed.scales.double()
    # The scale itself is rounded to float16, which the largest numbers of a row feel.
    rounding = torch.maximum(scales * 2.0**-11, torch.tensor(2.0**-25))
    if kv_dtype == "int8":
        return (scales * 0.5 + 127 * rounding).expand_as(tensor)
    return torch.maximum(tensor.double().abs() / 16, scales * 2.0**-10) + 448 * rounding


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_number_is_near(kv_dtype, dtype, size):
    tensor = numbers(dtype, min(size, 10.0) if dtype == torch.float16 else size)
    packed = Quantised.of(tensor, kv_dtype)
    error = (packed.to_dtype(torch.float64) - tensor.double()).abs()
    assert (error <= allowed(tensor, packed, kv_dtype)).all()
    assert error.max() > 0
    assert packed.to_dtype(dtype).dtype == dtype
    assert (packed.codes.element_size(), packed.scales.dtype, packed.scales.shape[-1]) == (1, torch.float16, 1)


@pytest.mark.parametrize(("kv_dtype", "bound"), [("int8", 0.01), ("fp8", 0.03)])
def test_every_head_is_off_by_little_on_the_whole(kv_dtype, bound):
    """Root mean square of the error against that of the numbers, head by head; smooth rows as keys and values are."""
    tensor = torch.randn(1, 8, 200, 64, generator=torch.Generator().manual_seed(1))
    error = Quantised.of(tensor, kv_dtype).to_dtype(torch.float32) - tensor
    relative = error.square().mean((0, 2, 3)).sqrt() / tensor.square().mean((0, 2, 3)).sqrt()
    assert relative.max() < bound


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("extreme", [0.0, 1e-12, 6e4, 1e7, 3e38])
def test_extremes_stay_finite_and_keep_their_sign(kv_dtype, extreme):
    tensor = torch.tensor([[extreme, -extreme, 0.0, extreme / 2]])
    back = Quantised.of(tensor, kv_dtype).to_dtype(torch.float32)
    assert torch.isfinite(back).all()
    assert (back * tensor >= 0).all()
    if 1e-3 < extreme < 1e6:
        torch.testing.assert_close(back, tensor, rtol=0.02, atol=0)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_rows_do_not_depend_on_each_other(kv_dtype):
    tensor = numbers()
    packed = Quantised.of(tensor, kv_dtype)
    back = packed.to_dtype(torch.float32)
    rows = torch.tensor([1, 0, 1])
    assert torch.equal(packed.change(lambda one: one.index_select(0, rows)).to_dtype(torch.float32), back[rows])
    assert torch.equal(packed.change(lambda one: one.repeat_interleave(2, 0)).to_dtype(torch.float32)[::2], back)
    halves = [Quantised.of(tensor[:, :, part], kv_dtype) for part in (slice(0, 20), slice(20, None))]
    assert torch.equal(halves[0].followed_by(halves[1]).to_dtype(torch.float32), back)
    assert packed.change(lambda one: one.clone()).codes.dtype == packed.codes.dtype


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8))
def test_integers_are_never_off_by_more_than_half_a_step(values):
    tensor = torch.tensor([values])
    packed = Quantised.of(tensor, "int8")
    error = (packed.to_dtype(torch.float64) - tensor.double()).abs()
    assert (error <= allowed(tensor, packed, "int8")).all()
