"""Merging: what was dropped is folded into what stays, by value against loops on the untrimmed model."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import DynamicCache

import crosstrim
from tests.support import merging, oracle, tiny
from tests.support.passes import RAGGED, SINGLE, hidden_from, split_turns
from tests.support.tiny import Image
from tests.trimming.test_oracle import BATCHES, generate
from tests.trimming.test_pyramid import selections


def seeing(batch):
    return oracle.feature_visibility(batch).any(-1).any(-1)


def sizes_of(groups):
    return [[len(of_sample[n]) for n in sorted(of_sample)] for of_sample in groups]


def reported_sizes(report):
    return [[size for image in images for size in image.group_sizes] for images in report.samples]


@pytest.mark.parametrize("samples", BATCHES.values(), ids=[name.replace(" ", "-") for name in BATCHES])
@pytest.mark.parametrize(
    "options",
    [{"k": 0.05}, {"keep": 0.2, "policy": "union"}, {"keep": 3, "policy": "union", "trim_first_layer": False}],
    ids=str,
)
def test_merged_equals_the_untrimmed_model_with_groups_merged_by_hand(model, samples, options):
    batch = tiny.inputs(*samples)
    knobs = {name: value for name, value in options.items() if name in ("k", "keep")}
    kept = oracle.kept_features(model, batch, **knobs)
    with crosstrim.trim(model, merge=True, **options) as trimmed:
        tokens, logits = generate(model, batch)
        report = trimmed.report()
    expected = merging.merged_logits(
        model, batch, kept | ~seeing(batch)[:, None], tokens[:, :-1], options.get("trim_first_layer", True)
    )[:, batch["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(expected.argmax(-1), tokens)
    assert reported_sizes(report) == sizes_of(merging.groups_of(model, batch, kept))
    assert sum(map(sum, reported_sizes(report))) == report.visible > report.kept
    told = [image["merged"] for sample in report.to_dict()["samples"] for image in sample["images"]]
    assert sum(told) == report.visible - report.kept


def test_merging_is_seen(model):
    batch = tiny.inputs(SINGLE)
    found = []
    for merge in (True, False):
        with crosstrim.trim(model, keep=5, merge=merge):
            found.append(generate(model, batch)[1])
    assert (found[0] - found[1]).abs().max() > 0.05


@pytest.mark.parametrize("options", [{}, {"k": 1.0}, {"keep": 1.0}, {"keep": 10**6}], ids=str)
def test_where_nothing_is_dropped_not_a_bit_changes(model, options):
    batch = tiny.inputs(*RAGGED)
    with crosstrim.trim(model, **options):
        expected = generate(model, batch)
    with crosstrim.trim(model, merge=True, **options) as trimmed:
        found = generate(model, batch)
        assert all(image.group_sizes is None for images in trimmed.report().samples for image in images)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_leaders_cache_is_as_without_merging(model):
    batch = tiny.inputs(*RAGGED)
    caches = []
    for merge in (True, False):
        with torch.no_grad(), crosstrim.trim(model, keep=5, merge=merge):
            caches.append(model(**batch).past_key_values)
    leaders, followers = ([cache.layers[index] for cache in caches] for index in tiny.CROSS_LAYERS[:2])
    assert torch.equal(leaders[0].keys, leaders[1].keys)
    assert leaders[0].kept.groups is None
    assert not torch.equal(followers[0].keys, followers[1].keys)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_score_as_the_oracle_scores_their_sequences(model, use_cache):
    batch, beams = tiny.inputs(*RAGGED), 3
    kept = oracle.kept_features(model, batch, k=0.1)
    with crosstrim.trim(model, k=0.1, merge=True):
        out = model.generate(
            **batch,
            max_new_tokens=6,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
            use_cache=use_cache,
        )
    wide = {name: tensor.repeat_interleave(beams, dim=0) for name, tensor in batch.items()}
    start = batch["input_ids"].shape[1]
    tokens = out.sequences[:, start:]
    logits = merging.merged_logits(model, wide, kept.repeat_interleave(beams, 0), tokens[:, :-1])[:, start - 1 :]
    scores = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [[SINGLE], RAGGED], ids=["single", "ragged"])
def test_each_follower_of_a_pyramid_has_groups_of_its_own(model, samples):
    batch = tiny.inputs(*samples)
    layers = selections(model, batch, {"k": 0.1}, 0.3)
    with crosstrim.trim(model, policy="pyramid:0.3", k=0.1, merge=True):
        tokens, logits = generate(model, batch)
    prompt = batch["input_ids"].shape[1]
    _, saliency = merging.leaders_view(model, batch)
    groups = [merging.groups_of(model, batch, kept) for kept in layers]
    assert groups[1] != groups[2]
    with contextlib.ExitStack() as stack:
        stack.enter_context(hidden_from(model, tiny.CROSS_LAYERS[:1], prompt, ~layers[0]))
        for index, kept, group in list(zip(tiny.CROSS_LAYERS, layers, groups, strict=True))[1:]:
            stack.enter_context(hidden_from(model, (index,), 0, ~kept))
            stack.enter_context(merging.merged_in(model, (index,), group, saliency))
        everything = torch.ones_like(layers[0])
        expected = oracle.masked_logits(model, batch, everything, tokens[:, :-1], trim_first_layer=False)
    torch.testing.assert_close(logits, expected[:, prompt - 1 :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("trim_first_layer", [True, False])
def test_an_appended_image_is_merged_alone(model, trim_first_layer):
    length, size = 14, tiny.FEATURES_PER_IMAGE
    two = tiny.inputs([2, Image(4), length - 4, Image(2, seed=1), 6])
    two["cross_attention_mask"][:, length:, 0] = 1  # later rows see both
    first, second = split_turns(two, length)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad(), crosstrim.trim(model, k=0.1, merge=True, trim_first_layer=trim_first_layer) as trimmed:
        model(**first, past_key_values=cache)
        logits = model(**second, past_key_values=cache).logits
        report = trimmed.report(cache)

    kept = torch.zeros(1, 2 * size, dtype=torch.bool)  # that the right ones are kept, other tests say
    for image in report.samples[0]:
        kept[0, list(image.kept_indices)] = True
    hidden = ~kept & (torch.arange(2 * size) < size) & trim_first_layer
    _, old = merging.leaders_view(model, first)
    with hidden_from(model, tiny.CROSS_LAYERS[:1], length, hidden):
        keys, _ = merging.leaders_view(model, two)
        new = oracle.leader_attention(model, two)[:, :, length:].sum(2)
    saliency = torch.cat([old, new[..., size:]], dim=-1)
    groups = merging.groups_by_loops(keys, oracle.feature_visibility(two).any(1), kept, size)
    with (
        torch.no_grad(),
        hidden_from(model, tiny.CROSS_LAYERS[:1], length, hidden),
        hidden_from(model, tiny.CROSS_LAYERS[1:], 0, ~kept),
        merging.merged_in(model, tiny.CROSS_LAYERS[1:], groups, saliency),
    ):
        expected = model(**two, use_cache=False).logits[:, length:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert reported_sizes(report) == sizes_of(groups)


def test_merged_and_plain_images_share_a_conversation(model):
    """The older picture was merged and the newer one is not: each slot weighs what it stands for."""
    two = tiny.inputs([2, Image(4), 9, Image(3, seed=4), 5])
    first, second = split_turns(two, 13)
    cache = DynamicCache()
    with torch.no_grad(), crosstrim.trim(model, keep=6, merge=True):
        model(**first, past_key_values=cache, use_cache=True)
    with torch.no_grad(), crosstrim.trim(model, keep=6) as trimmed:
        model(**second, past_key_values=cache, use_cache=True)
        older, newer = trimmed.report(cache).samples[0]
    assert sum(older.group_sizes) == older.visible
    assert newer.group_sizes == (1,) * 6
