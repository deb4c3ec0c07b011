"""Layers that drop more and more: each against the untrimmed model with its own features masked."""

from __future__ import annotations

import contextlib

import pytest
import torch

import crosstrim
from crosstrim.method import policies
from tests.support import oracle, tiny
from tests.support.passes import hidden_from
from tests.support.tiny import Image

BATCHES = [[[2, Image(4), 9]], [[2, Image(4), 9], [1, Image(1, seed=1), 4]]]


def selections(model, batch, knobs, last):
    """[B, N] bool per cross-attention layer, by the loops of the oracle."""
    kept = oracle.kept_features(model, batch, **knobs)
    weights = oracle.leader_attention(model, batch)
    seen = oracle.feature_visibility(batch)
    rating = batch["attention_mask"].bool() & seen.any(-1)
    saliency = (weights * rating[:, None, :, None]).sum(2)
    layers = [kept]
    followers = len(tiny.CROSS_LAYERS) - 1
    for place in range(followers):
        share = round(1 - (1 - last) * place / (followers - 1), 9)
        layers.append(oracle.kept_by_loops(saliency, kept, keep=share, size=tiny.FEATURES_PER_IMAGE))
    return layers


@pytest.mark.parametrize("samples", BATCHES, ids=["single", "ragged"])
@pytest.mark.parametrize("knobs", [{"k": 0.1}, {"keep": 0.4}], ids=str)
def test_each_layer_reads_its_own_share(model, samples, knobs):
    batch, last = tiny.inputs(*samples), 0.3
    layers = selections(model, batch, knobs, last)
    with crosstrim.trim(model, policy=f"pyramid:{last}", **knobs) as trimmed:
        out = model.generate(**batch, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
        report = trimmed.report(out.past_key_values)
    for sample, images in enumerate(report.samples):
        assert images[0].layers == tuple(int(kept[sample].sum()) for kept in layers)
        assert images[0].layers[0] == images[0].layers[1] > images[0].layers[2]
        assert images[0].kept_fraction == sum(images[0].layers) / 3 / images[0].visible
    for index, kept in zip(tiny.CROSS_LAYERS, layers, strict=True):
        assert out.past_key_values.layers[index].keys.shape[2] == int(kept.sum(-1).max())

    prompt = batch["input_ids"].shape[1]
    tokens = out.sequences[:, prompt:]
    with contextlib.ExitStack() as stack:
        stack.enter_context(hidden_from(model, tiny.CROSS_LAYERS[:1], prompt, ~layers[0]))
        for index, kept in list(zip(tiny.CROSS_LAYERS, layers, strict=True))[1:]:
            stack.enter_context(hidden_from(model, (index,), 0, ~kept))
        expected = oracle.masked_logits(
            model, batch, torch.ones_like(layers[0]), tokens[:, :-1], trim_first_layer=False
        )[:, prompt - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=0)


def test_without_a_cache_it_is_the_same(model):
    batch = tiny.inputs(*BATCHES[1])
    with crosstrim.trim(model, k=0.1, policy="pyramid:0.3"):
        cached = model.generate(**batch, max_new_tokens=6)
        assert torch.equal(model.generate(**batch, max_new_tokens=6, use_cache=False), cached)


def test_without_a_budget_the_policy_within_decides(model):
    batch = tiny.inputs(*BATCHES[1])
    kept = []
    for policy in (policies.Mass(0.6), policies.Pyramid(0.5, policies.Mass(0.6))):
        with crosstrim.trim(model, policy=policy) as trimmed:
            model.generate(**batch, max_new_tokens=2)
            kept.append([images[0].layers for images in trimmed.report().samples])
    for alone, (first, second, last) in zip(*kept, strict=True):
        assert alone == (first, first, second)
        assert last == -(-first // 2)


def test_shares_fall_evenly_from_all_to_the_last():
    assert policies.Pyramid(0.4).shares(4) == (1.0, 0.8, 0.6, 0.4)
    assert policies.Pyramid(1.0).shares(3) == (1.0, 1.0, 1.0)
    assert policies.Pyramid(0.4).shares(1) == (1.0,)
    assert policies.Pyramid(1e-12).shares(2) == (1.0, 1e-9), "never nothing at all"
