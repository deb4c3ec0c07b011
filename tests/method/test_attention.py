"""Attention without a mask against the definition, head by head and sample by sample."""

from __future__ import annotations

import pytest
import torch

from crosstrim.method.attention import attend


def attend_by_loops(queries, keys, values, counts, scale, bias=None):
    batch, heads, rows, size = queries.shape
    output = torch.zeros(batch, rows, heads, size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h * keys.shape[1] // heads
            key, value = keys[b, group, : counts[b]].double(), values[b, group, : counts[b]].double()
            for t in range(rows):
                logits = key @ queries[b, h, t].double() * scale
                logits += 0 if bias is None else bias[b, : counts[b]]
                output[b, t, h] = logits.softmax(-1) @ value
    return output.flatten(2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("counts", [(7, 7, 7), (5, 5, 7), (1, 7, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_every_row_reads_what_its_sample_keeps(rows, counts, key_heads):
    torch.manual_seed(0)
    queries = torch.randn(3, rows, 6, 4).transpose(1, 2)  # as the projection leaves them
    keys, values = torch.randn(2, 3, key_heads, 7, 4)
    output = attend(queries, keys, values, counts, 0.7)
    torch.testing.assert_close(
        output.double(), attend_by_loops(queries, keys, values, counts, 0.7), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("counts", [(7, 7, 7), (2, 3, 4)], ids=str)
def test_a_bias_is_added_for_every_row_and_head(counts):
    torch.manual_seed(0)
    queries, bias = torch.randn(3, 6, 2, 4), torch.rand(3, 7) * 3
    keys, values = torch.randn(2, 3, 2, 7, 4)
    output = attend(queries, keys, values, counts, 0.7, bias)
    expected = attend_by_loops(queries, keys, values, counts, 0.7, bias)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


def test_what_a_sample_does_not_read_may_be_anything():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    expected = attend(queries, keys, values, (3, 5), 1.0)
    keys[0, :, 3:] = values[0, :, 3:] = torch.nan
    assert torch.equal(attend(queries, keys, values, (3, 5), 1.0), expected)


def test_bfloat16_is_rounded_once():
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 4, 2, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8))
    low = [tensor.bfloat16() for tensor in (queries, keys, values)]
    output = attend(*low, (9, 4), 1.0)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), attend_by_loops(*low, (9, 4), 1.0), atol=2e-2, rtol=0)
