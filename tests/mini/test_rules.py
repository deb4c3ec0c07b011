"""What is measured beside the shipped rules is what its name says."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from recipes import layers, rules

import crosstrim
from crosstrim.asking import answering
from crosstrim.asking.batches import Encoder
from crosstrim.data import dataset
from crosstrim.eval.items import asked
from crosstrim.method.policy import Evidence

KEEP = 0.1
TILE, SIZE = 5, 10


@pytest.fixture(scope="module")
def answers():
    """From a rule to the logits of three tokens, [4, 3, V]."""
    model, processor = crosstrim.load("mini")
    items = dataset.embedded().items[6:10]

    def given(way):
        seen = []
        hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[:, -1]))
        try:
            with asked(Encoder(model, processor), items) as inputs, way(model, KEEP) as config:
                answering.generate(model, processor, inputs, config=config, max_new_tokens=3, min_new_tokens=3)
        finally:
            hook.remove()
        return torch.stack(seen, 1)

    return given


@pytest.fixture
def evidence():
    generator = torch.Generator().manual_seed(0)
    visible = torch.ones(2, 2 * SIZE, dtype=torch.bool)
    visible[1, -TILE:] = False
    saliency = torch.rand(2, 4, 2 * SIZE, generator=generator) * visible.unsqueeze(1)
    keys, values = torch.randn(2, 2, 2, 2 * SIZE, 3, generator=generator)
    budget = torch.full((2, 2), 3)
    return Evidence(saliency, visible, keys, values, budget, features_per_image=SIZE, features_per_tile=TILE)


def test_the_first_layers_choice_hidden_by_masks_answers_as_the_trim(answers):
    trimmed = answers(rules.shipped())
    hidden = answers(partial(layers.emulated, choosing="first", whole=False))
    torch.testing.assert_close(hidden, trimmed, atol=1e-4, rtol=1e-4)
    for choosing, whole in (("first", True), ("each", True), ("each", False), ("within", True)):
        other = answers(partial(layers.emulated, choosing=choosing, whole=whole))
        assert (other - trimmed).abs().amax() > 1e-2, (choosing, whole)


def test_merging_the_first_layers_cache_shows_after_the_prompt(answers):
    merged, both = answers(rules.shipped(merge=True)), answers(layers.merged_leader)
    assert torch.equal(both[:, 0], merged[:, 0])
    assert (both[:, 1:] - merged[:, 1:]).abs().amax() > 1e-3


@pytest.mark.parametrize("name", [name for name in rules.WAYS if name.startswith(("merged", "summary"))])
def test_each_way_to_merge_is_another(answers, name):
    assert (answers(rules.WAYS[name]) - answers(rules.shipped(merge=True))).abs().amax() > 1e-3


def test_nothing_stays_behind(answers):
    before = answers(rules.shipped(merge=True))
    for way in rules.WAYS.values():
        answers(way)
    assert torch.equal(answers(rules.shipped(merge=True)), before)


def test_class_tokens_stand_first(evidence):
    votes = rules.class_tokens_first(evidence)[:, 0]
    for sample in votes:
        assert set(sample.topk(4).indices.tolist()) == {0, TILE, SIZE, SIZE + TILE}


def test_a_head_that_looks_everywhere_alike_weighs_nothing(evidence):
    even = evidence.saliency.clone()
    even[:, 0] = evidence.visible.float()
    with_it = rules.entropy_weighted(_with(evidence, even))
    even[:, 0] *= 100
    assert torch.equal(rules.entropy_weighted(_with(evidence, even)), with_it)


def test_what_is_spread_does_not_stand_side_by_side(evidence):
    saliency = torch.full_like(evidence.saliency, 0.5)
    saliency[:, :, 1], saliency[:, :, 2], saliency[:, :, 4] = 1.0, 0.99, 0.9  # of 2 x 2 patches: 2 lies beside 1
    wide = torch.arange(TILE * 4) % TILE > 0
    votes = rules.spread(_with(evidence, saliency * wide))[0, 0]
    assert votes[1] > votes[4] > votes[2]


def test_half_and_half_takes_in_turn(evidence):
    votes = rules.half_grid(evidence)
    assert votes.shape == (2, 1, 2 * SIZE)
    four = set(votes[0, 0].topk(4).indices.tolist())
    heads = set(evidence.saliency[0].argmax(-1).tolist())
    assert four & heads
    assert 0 in four  # the first of the grid


def test_the_largest_row_is_that_of_loops():
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(1, 4, 3, 2, generator=generator), torch.randn(1, 2, 5, 2, generator=generator)
    visible = torch.ones(1, 3, 5, dtype=torch.bool)
    visible[0, 1, 2:] = False
    rating = torch.tensor([[True, True, False]])
    found = rules.largest_row(queries, keys, visible, rating_rows=rating)
    for head in range(4):
        rows = [
            (queries[0, head, row] @ keys[0, head // 2].T / 2**0.5)
            .masked_fill(~visible[0, row], -torch.inf)
            .softmax(-1)
            for row in (0, 1)
        ]
        torch.testing.assert_close(found[0, head], torch.maximum(*rows))


def test_a_summary_stands_for_all_that_was_dropped(evidence):
    kept = torch.zeros(2, 2 * SIZE, dtype=torch.bool)
    kept[:, [1, 3, SIZE + 2, SIZE + 4]] = True
    votes = torch.arange(2 * SIZE).float().expand(2, 1, -1)
    choice = SimpleNamespace(evidence=evidence, votes=votes, visible=evidence.visible, features_per_image=SIZE)
    groups = rules.summary(choice, kept)
    assert groups.sizes[0, [1, 3, SIZE + 2, SIZE + 4]].tolist() == [SIZE - 1, 1, SIZE - 1, 1]
    assert groups.sizes[1, [SIZE + 2]].tolist() == [SIZE - 1 - TILE]


def _with(evidence, saliency):
    return Evidence(saliency, evidence.visible, evidence.keys, evidence.values, evidence.budget, SIZE, TILE)
