"""Saliency against a float64 loop, and its promise about memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosstrim
from crosstrim import saliency as function
from crosstrim.errors import InputError
from crosstrim.method.kernels import saliency_torch
from tests.support.oracle import saliency_by_loops
from tests.support.watched_device import DEVICE, device


def case(seed=0, batch=2, heads=4, key_heads=2, rows=5, features=11, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, heads, rows, size, generator=generator).mul(2).to(dtype)
    keys = torch.randn(batch, key_heads, features, size, generator=generator).to(dtype)
    visible = torch.rand(batch, rows, features, generator=generator) < 0.7
    visible[0, 0] = False  # a row before the image
    rating = torch.rand(batch, rows, generator=generator) < 0.8
    return queries, keys, visible, rating


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (4, 4)]),
    st.integers(1, 9),
    st.integers(1, 13),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_the_loops(seed, batch, heads, rows, features, dtype):
    queries, keys, visible, rating = case(seed, batch, *heads, rows, features, dtype=dtype)
    got = function(queries, keys, visible, rating_rows=rating, scale=0.3)
    assert got.dtype == torch.float32
    expected = saliency_by_loops(queries, keys, visible, rating, 0.3)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_defaults_are_all_rows_and_the_usual_scale():
    queries, keys, visible, _ = case()
    expected = saliency_by_loops(queries, keys, visible, visible.any(-1), 8**-0.5)
    torch.testing.assert_close(function(queries, keys, visible).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scores", [1, 3 * 2 * 11, 50 * 2 * 11, 50 * 3 * 11 * 2], ids=str)
def test_chunks_of_rows_and_of_heads_do_not_change_the_result(monkeypatch, scores):
    queries, keys, visible, rating = case(3, 2, 6, 3, 50, 11)
    whole = function(queries, keys, visible, rating_rows=rating)
    monkeypatch.setattr(saliency_torch, "CHUNK_BYTES", 4 * scores)
    torch.testing.assert_close(function(queries, keys, visible, rating_rows=rating), whole, atol=1e-5, rtol=0)


def test_padding_and_batch_mates_change_nothing_to_the_last_bit():
    queries, keys, visible, rating = case(rows=6)
    rating[0, :2] = False
    together = function(queries, keys, visible, rating_rows=rating)
    alone = function(queries[:1, :, 2:], keys[:1], visible[:1, 2:], rating_rows=rating[:1, 2:])
    assert torch.equal(together[:1], alone)


def test_invisible_features_change_nothing():
    """Only what some rating row sees is computed; what it sees may have holes that differ from row to row."""
    queries, keys, visible, rating = case(rows=6, features=40)
    visible[..., ::3] = False
    got = function(queries, keys, visible, rating_rows=rating)
    assert not got[..., ::3].any()
    left = torch.arange(40) % 3 != 0
    assert torch.equal(got[..., left], function(queries, keys[:, :, left], visible[..., left], rating_rows=rating))


@pytest.mark.parametrize("scores", [10**6, 3 * 2 * 40], ids=["whole", "in chunks"])
def test_features_that_stand_together_may_share_an_entry(monkeypatch, scores):
    monkeypatch.setattr(saliency_torch, "CHUNK_BYTES", 4 * scores)
    queries, keys, visible, rating = case(rows=20, features=40)
    tiles = visible[..., :8] & (torch.arange(8) != 3)
    got = function(queries, keys, tiles, rating_rows=rating)
    each = tiles.repeat_interleave(5, dim=-1)
    assert torch.equal(got, function(queries, keys, each, rating_rows=rating))


def test_no_gradient_flows():
    queries, keys, visible, rating = case()
    got = function(queries.requires_grad_(), keys.requires_grad_(), visible, rating_rows=rating)
    assert not got.requires_grad


def test_no_rating_row_gives_zeros():
    queries, keys, visible, rating = case()
    assert not function(queries, keys, visible, rating_rows=torch.zeros_like(rating)).any()
    assert not function(queries, keys, torch.zeros_like(visible)).any()


@pytest.mark.parametrize("scores", [10**6, 3 * 2 * 40], ids=["whole", "in chunks"])
def test_the_host_waits_for_no_device_wherever_the_masks_are(monkeypatch, scores):
    monkeypatch.setattr(saliency_torch, "CHUNK_BYTES", 4 * scores)
    monkeypatch.setattr(saliency_torch, "CHUNK_BYTES_ELSEWHERE", 4 * scores)
    queries, keys, visible, rating = case(rows=20, features=40)
    visible[..., ::3] = False
    expected = function(queries, keys, visible, rating_rows=rating)
    with device() as looks:
        moved = queries.to(DEVICE), keys.to(DEVICE)
        got = function(*moved, visible, rating_rows=rating)
        assert looks == []
        beside = function(*moved, visible.to(DEVICE), rating_rows=rating.to(DEVICE))
        assert looks == []
    assert torch.equal(got.values, expected)
    torch.testing.assert_close(beside.values, expected)  # sums over rows that do not count as well


MEASURE = """
import sys, torch
torch.set_num_threads(1)
import crosstrim

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

def peak(rows):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 32, rows, 128, generator=generator)
    keys = torch.randn(1, 8, 6404, 128, generator=generator)
    visible = torch.ones(1, rows, 6404, dtype=torch.bool)
    # What the libraries take for themselves.
    crosstrim.saliency(queries[:, :, :2], keys[:, :, :64], visible[:, :2, :64])
    result = torch.zeros(1, 32, 6404)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # forget the peak so far
    before = resident("VmRSS")
    crosstrim.saliency(queries, keys, visible)
    print(resident("VmHWM") - before - result.numel() * 4 / 2**20)

for rows in sys.argv[1:]:
    peak(int(rows))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_peak_memory_at_the_11b_shape_does_not_grow_with_the_text():
    # What glibc keeps of freed memory for later varies by chance; of pieces above this size it keeps nothing.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, "-c", MEASURE, "512", "2048"]
    measured = subprocess.run(command, capture_output=True, check=True, env=environment)
    short, long = map(float, measured.stdout.split())
    print(f"{short:.1f} and {long:.1f} MiB above inputs and result at 512 and 2048 rows")
    assert 0 < short < 64
    assert long < 1.1 * short  # the whole attention map would be 1601 MiB


def test_the_attention_map_is_never_materialised():
    """No tensor that the computation makes is larger than two chunks, at the 11B shape."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            sizes.extend(one.nbytes for one in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(one))
            return out

    queries, keys = torch.randn(1, 32, 64, 16), torch.randn(1, 8, 6404, 16)
    visible = torch.ones(1, 64, 6404, dtype=torch.bool)
    with Watch():
        crosstrim.saliency(queries, keys, visible)
    assert max(sizes) <= 2 * saliency_torch.CHUNK_BYTES < 32 * 64 * 6404 * 4 / 4


@pytest.mark.parametrize(
    ("change", "wording"),
    [
        ({"queries": torch.rand(2, 4, 8)}, r"\[B, Hq, T, D\]"),
        ({"keys": torch.rand(2, 3, 11, 8)}, "multiple of Hkv"),
        ({"keys": torch.rand(2, 2, 11, 4)}, "B and D must agree"),
        ({"queries": torch.ones(2, 4, 5, 8, dtype=torch.int64)}, "floating point"),
        ({"visible": torch.ones(2, 5, 11)}, "must be bool"),
        ({"visible": torch.ones(2, 5, 10, dtype=torch.bool)}, r"\(2, 5, 11\)"),
        (
            {"visible": torch.ones(2, 5, 11, dtype=torch.bool, device="meta")},
            "visible is on meta; .* as queries, on cpu",
        ),
        ({"rating_rows": torch.ones(2, 4, dtype=torch.bool)}, r"\(2, 5\)"),
    ],
)
def test_errors_name_what_they_met(change, wording):
    queries, keys, visible, rating = case()
    arguments = {"queries": queries, "keys": keys, "visible": visible, "rating_rows": rating} | change
    with pytest.raises(InputError, match=wording):
        function(**arguments)
