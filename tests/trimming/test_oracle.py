"""The trimmed model against the untrimmed one: nothing changes when nothing may, and exactly the right thing else."""

from __future__ import annotations

import pytest
import torch

import crosstrim
from tests.support import oracle, tiny
from tests.support.tiny import Image

BATCHES = {
    "four tiles": [[2, Image(4), 9]],
    "one tile": [[2, Image(1), 9]],
    "two images": [[1, Image(4), 5, Image(2, seed=1), 7]],
    "adjacent images": [[Image(2), Image(3, seed=1), 8]],
    "left padded": [[2, Image(4), 9], [1, Image(1, seed=1), 4], [4, Image(3, seed=2), 12]],
    "left padded, uneven images": [[2, Image(4), 9], [1, Image(1, seed=1), 4, Image(2, seed=3), 2]],
    "with a text-only sample": [[2, Image(4), 9], [6]],
}
NEW_TOKENS = 4


def generate(model, batch, **options):
    out = model.generate(
        **batch, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


@pytest.fixture(params=BATCHES, ids=lambda name: name.replace(" ", "-"))
def batch(request):
    return tiny.inputs(*BATCHES[request.param])


def test_features_matter(model):
    """Were the gates closed or the attention flat, every other test here would pass vacuously."""
    batch = tiny.inputs([2, Image(4), 9])
    with torch.no_grad():
        whole = model(**batch).logits[:, -1]
        with crosstrim.trim(model, keep=1):
            trimmed = model(**batch).logits[:, -1]
    assert (whole - trimmed).abs().max() > 0.05


@pytest.mark.parametrize("options", [{}, {"k": 1.0}, {"keep": 1.0}, {"k": 1.0, "trim_first_layer": False}])
def test_keeping_everything_visible_changes_nothing(model, batch, options):
    expected_tokens, expected_logits = generate(model, batch)
    with crosstrim.trim(model, **options) as trimmed:
        tokens, logits = generate(model, batch)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
    assert trimmed.report().kept == trimmed.report().visible > 0


def test_lossless_is_exact_on_an_unrepaired_model_too(raw_model, batch):
    expected_tokens, expected_logits = generate(raw_model, batch)
    with pytest.warns(crosstrim.errors.CompatWarning), crosstrim.trim(raw_model):
        tokens, logits = generate(raw_model, batch)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0.05},
        {"k": 0.2, "trim_first_layer": False},
        {"k": 0.1, "k_base": "all"},
        {"keep": 0.3, "policy": "union"},
        {"keep": 7, "policy": "union"},
    ],
    ids=str,
)
def test_trimmed_equals_the_untrimmed_model_with_dropped_features_masked(model, batch, options):
    knobs = {name: value for name, value in options.items() if name not in ("trim_first_layer", "policy")}
    kept = oracle.kept_features(model, batch, **knobs)
    with crosstrim.trim(model, **options) as trimmed:
        tokens, logits = generate(model, batch)
        report = trimmed.report()
    for sample, row in enumerate(report.samples):
        chosen = [index for image in row for index in image.kept_indices]
        assert chosen == kept[sample].nonzero().squeeze(-1).tolist()
    seeing = oracle.feature_visibility(batch).any(-1).any(-1)
    expected = oracle.masked_logits(
        model, batch, kept | ~seeing[:, None], tokens[:, :-1], options.get("trim_first_layer", True)
    )[:, batch["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(expected.argmax(-1), tokens)


@pytest.mark.parametrize("options", [{}, {"k": 0.1}, {"keep": 0.25}])
def test_cache_bytes_fall_to_the_kept_fraction(model, batch, options):
    features = batch["cross_attention_mask"][0, 0].numel() * tiny.FEATURES_PER_TILE
    with torch.no_grad(), crosstrim.trim(model, **options) as trimmed:
        cache = model(**batch).past_key_values
    report = trimmed.report(cache)
    longest = max(sum(image.kept for image in row) for row in report.samples)
    held = 0
    for index in tiny.CROSS_LAYERS:
        layer = cache.layers[index]
        assert layer.keys.shape[2] == layer.values.shape[2] == longest
        held += layer.keys.numel() * 4 + layer.values.numel() * 4
    assert report.kv_bytes == held
    assert report.kv_bytes_untrimmed == held // longest * features
    assert report.to_dict()["kv_bytes"] == held


@pytest.mark.parametrize("merge", [False, True])
def test_a_sample_does_not_depend_on_its_batch_mates(model, merge):
    samples = BATCHES["left padded"]
    with crosstrim.trim(model, k=0.1, merge=merge) as trimmed:
        together, logits = generate(model, tiny.inputs(*samples))
        reports = trimmed.report().samples
        for place, sample in enumerate(samples):
            alone, own_logits = generate(model, tiny.inputs(sample, seeds=[place]))
            assert torch.equal(alone[0], together[place])
            torch.testing.assert_close(own_logits[0], logits[place], atol=1e-4, rtol=0)
            assert trimmed.report().samples[0] == reports[place]
