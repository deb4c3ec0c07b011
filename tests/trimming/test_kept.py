"""What a cache was trimmed to: how many features each sample reads, through all that happens to a batch."""

from __future__ import annotations

import pytest
import torch

from crosstrim.trimming.kept import Kept

MIN = torch.finfo(torch.float32).min


def state(*rows):
    kept = torch.tensor(rows, dtype=torch.bool)
    return Kept.of(kept, torch.ones_like(kept), kept.shape[1])


EVEN, RAGGED, BLIND = state([1, 0, 1], [0, 1, 1]), state([1, 1, 1], [0, 0, 1]), state([0, 0, 0], [1, 1, 0])


def test_counts_and_whether_slots_only_fill_up():
    assert (EVEN.counts, EVEN.rectangular) == ((2, 2), True)
    assert (RAGGED.counts, RAGGED.rectangular) == ((3, 1), False)
    assert (BLIND.counts, BLIND.rectangular) == ((0, 2), False)
    nothing = state([0, 0], [0, 0])
    assert (nothing.counts, nothing.rectangular, nothing.length) == ((0, 0), False, 1)


@pytest.mark.parametrize(
    ("old", "new", "counts", "rectangular"),
    [
        (EVEN, EVEN, (4, 4), True),
        (EVEN, RAGGED, (5, 3), False),
        (RAGGED, EVEN, None, False),
        (BLIND, EVEN, None, False),
    ],
)
def test_holes_between_pictures_have_no_count(old, new, counts, rectangular):
    both = old.extended(new)
    assert (both.counts, both.rectangular) == (counts, rectangular)
    assert both.readable(None) == counts


def test_counts_follow_the_batch():
    assert RAGGED.batch(lambda tensor: tensor[torch.tensor([1, 1, 0])]).counts == (1, 1, 3)
    assert RAGGED.batch(lambda tensor: tensor[torch.tensor([1])]).rectangular is False
    assert EVEN.batch(lambda tensor: tensor.repeat_interleave(2, 0)).counts == (2,) * 4
    assert RAGGED.extended(EVEN).batch(lambda tensor: tensor[:1]).counts is None


@pytest.mark.parametrize(
    ("one", "mask", "counts"),
    [
        (EVEN, [[[0, 0, 0]], [[0, 0, 0]]], (2, 2)),
        (EVEN, [[[0, MIN, 0]], [[MIN, 0, 0]]], (2, 2)),  # what is hidden was not kept
        (EVEN, [[[0, 0, MIN]], [[0, 0, 0]]], None),
        (EVEN, [[[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, MIN]]], None),  # one row of one sample is enough
        (RAGGED, [[[0, 0, 0]], [[MIN, MIN, 0]]], (3, 1)),
        (RAGGED, [[[0, 0, 0]], [[0, 0, MIN]]], None),
        (BLIND, [[[0, 0, 0]], [[0, 0, 0]]], (1, 2)),  # attention over nothing is undefined
    ],
)
def test_a_mask_that_says_no_more_than_the_counts(one, mask, counts):
    mask = torch.tensor(mask, dtype=torch.float32)[:, None]
    assert one.readable(one.trim_mask(mask, mask.shape[2], mask.dtype)) == counts


def test_no_mask_is_read_by_its_counts_and_shapes_without_values_are_not_read():
    assert EVEN.readable(None) == (2, 2)
    assert EVEN.readable(torch.zeros(2, 1, 1, 2, device="meta")) is None
