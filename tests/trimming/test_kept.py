"""What a cache was trimmed to: how many features each sample reads, through all that happens to a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crosstrim.method.merge import Groups
from crosstrim.trimming.kept import Kept

MIN = torch.finfo(torch.float32).min


def state(*rows):
    kept = torch.tensor(rows, dtype=torch.bool)
    return Kept.of(kept, torch.ones_like(kept))


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


@pytest.mark.parametrize("one", [EVEN, RAGGED], ids=["even", "ragged"])
def test_weights_of_groups_are_no_reason_for_a_mask(one):
    groups = Groups.singles(one.kept)
    merged = replace(one, groups=replace(groups, sizes=torch.tensor([[2, 3, 1], [1, 1, 5]])))
    mask = torch.zeros(2, 1, 2, 3)
    trimmed = merged.trim_mask(mask, 2, mask.dtype)
    assert merged.readable(trimmed) == one.counts
    shown = one.occupied[:, None, None].expand_as(trimmed)
    assert torch.equal(trimmed[shown], merged.bias(mask)[:, None, None].expand_as(trimmed)[shown])
    assert torch.equal(merged.trim_mask(None, 2, mask.dtype), trimmed)
    mask[0, 0, 1, int(one.slots[0, 0])] = MIN  # one row does not see what is kept
    assert merged.readable(merged.trim_mask(mask, 2, mask.dtype)) is None


def test_no_mask_is_read_by_its_counts_and_shapes_without_values_are_not_read():
    assert EVEN.readable(None) == (2, 2)
    assert EVEN.readable(torch.zeros(2, 1, 1, 2, device="meta")) is None
