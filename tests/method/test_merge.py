"""Groups and their means, against loops."""

from __future__ import annotations

import math

import pytest
import torch

from crosstrim.method.merge import Groups, groups_of
from tests.support import merging

SIZE = 12


def evidence(batch=2, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = images * SIZE
    keys = torch.randn(batch, 3, count, 4, generator=generator)
    saliency = torch.rand(batch, 6, count, generator=generator)
    visible = torch.rand(batch, count, generator=generator) < 0.8
    kept = visible & (torch.rand(batch, count, generator=generator) < 0.3)
    return keys, saliency, visible, kept


def means_of(groups, features):
    """Of every place, [B, N, hidden]."""
    return groups.means(features, torch.arange(features.shape[1]).expand(len(features), -1))


def members(groups, kept):
    """Per sample {kept feature: its group, the feature itself first}."""
    found = []
    for into, stays in zip(groups.into.tolist(), kept.tolist(), strict=True):
        homes = {n: [n] for n, stay in enumerate(stays) if stay}
        for n, home in enumerate(into):
            if home != n:
                homes[home].append(n)
        found.append(homes)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_groups_and_means_are_those_of_the_loops(seed):
    keys, saliency, visible, kept = evidence(seed=seed)
    groups = groups_of(keys, saliency, visible, kept, SIZE)
    expected = merging.groups_by_loops(keys, visible, kept, SIZE)
    assert members(groups, kept) == expected
    features = torch.randn(2, 2 * SIZE, 5)
    means, bias = means_of(groups, features), groups.bias(torch.arange(2 * SIZE).expand(2, -1))
    for sample, of_sample in enumerate(expected):
        for n, group in of_sample.items():
            wanted = merging.mean_by_loops(features[sample], saliency[sample], group).float()
            torch.testing.assert_close(means[sample, n], wanted, atol=1e-6, rtol=0)
            assert groups.sizes[sample, n] == len(group)
            assert float(bias[sample, n]) == pytest.approx(math.log(len(group)))


def test_never_across_images_and_never_what_nobody_sees():
    keys, saliency, visible, kept = evidence(seed=7)
    kept[0, :SIZE] = False  # nothing of one image stays: nothing of it is merged
    into = groups_of(keys, saliency, visible, kept, SIZE).into
    own = torch.arange(2 * SIZE).expand(2, -1)
    assert torch.equal(into // SIZE, own // SIZE)
    assert torch.equal(into[~visible | kept], own[~visible | kept])
    assert torch.equal(into[0, :SIZE], own[0, :SIZE])


def test_ties_go_to_the_lower_index():
    keys = torch.ones(1, 1, 4, 2)
    kept = torch.tensor([[False, True, True, False]])
    groups = groups_of(keys, torch.ones(1, 1, 4), torch.ones_like(kept), kept, 4)
    assert groups.into.tolist() == [[1, 1, 2, 1]]
    assert groups.sizes[0, 1:3].tolist() == [3, 1]


def test_a_group_that_nobody_looked_at_is_a_plain_mean():
    kept = torch.tensor([[True, False, True, False]])
    keys = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])[None, None]
    saliency = torch.tensor([[[0.0, 0, 0, 2]]])
    groups = groups_of(keys, saliency, torch.ones_like(kept), kept, 4)
    assert groups.weights.tolist() == [[0.5, 0.5, 0.0, 1.0]]
    means = groups.means(torch.tensor([[[2.0], [4.0], [6.0], [8.0]]]), torch.tensor([[0, 2]]))
    assert means[0, :, 0].tolist() == [3.0, 8.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_one_is_the_feature_to_the_bit(dtype):
    keys, saliency, visible, _ = evidence(seed=3)
    kept = visible & (torch.arange(2 * SIZE) % 4 > 0)
    groups = groups_of(keys, saliency, visible, kept, SIZE)
    features = torch.randn(2, 2 * SIZE, 5).to(dtype)
    alone = kept & (groups.sizes == 1)
    assert alone.any()
    means = means_of(groups, features)
    assert means.dtype == dtype
    assert torch.equal(means[alone], features[alone])


def test_means_are_computed_in_full_precision_under_autocast():
    keys, saliency, visible, kept = evidence()
    expected = groups_of(keys, saliency, visible, kept, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = groups_of(keys, saliency, visible, kept, SIZE)
    assert torch.equal(found.into, expected.into)
    assert torch.equal(found.weights, expected.weights)


def test_singles_change_nothing():
    features = torch.randn(2, 6, 3)
    groups = Groups.singles(torch.zeros(2, 6))
    assert torch.equal(means_of(groups, features), features)
    assert not groups.bias(torch.arange(6).expand(2, -1)).any()


def test_gradients_reach_every_member():
    keys, saliency, visible, kept = evidence()
    groups = groups_of(keys, saliency, visible, kept, SIZE)
    features = torch.randn(2, 2 * SIZE, 5, requires_grad=True)
    means_of(groups, features)[kept].sum().backward()
    reached = kept.gather(1, groups.into)
    assert torch.equal(features.grad, (groups.weights * reached).unsqueeze(-1).expand_as(features))


def test_groups_of_older_and_newer_features_side_by_side():
    pair = [groups_of(*evidence(seed=seed), SIZE) for seed in (1, 2)]
    features = torch.randn(2, 2, 2 * SIZE, 5)
    both = pair[0].followed_by(pair[1])
    expected = torch.cat([means_of(groups, part) for groups, part in zip(pair, features, strict=True)], dim=1)
    assert torch.equal(means_of(both, torch.cat(list(features), dim=1)), expected)
    assert torch.equal(both.sizes, torch.cat([groups.sizes for groups in pair], dim=1))


def test_samples_that_move_take_their_groups_along():
    groups, features = groups_of(*evidence(), SIZE), torch.randn(2, 2 * SIZE, 5)
    order = torch.tensor([1, 0, 1])
    moved = groups.change(lambda tensor: tensor[order])
    assert torch.equal(means_of(moved, features[order]), means_of(groups, features)[order])
