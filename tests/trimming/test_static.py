"""Static caches: the trimmed length is fixed per bucket, and compiled decoding serves every request in it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import crosstrim
from crosstrim.errors import UnsupportedCacheError
from crosstrim.trimming.cache import bucket
from tests.support import tiny
from tests.support.passes import RAGGED, compiled_config, split_turns
from tests.support.tiny import Image

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="its static cache has no room for Mllama, trimmed or not",
)
SINGLE = [[2, Image(4), 9]]


def generate(model, batch, **options):
    return model.generate(**batch, max_new_tokens=6, return_dict_in_generate=True, output_logits=True, **options)


@pytest.mark.parametrize("samples", [SINGLE, RAGGED], ids=["single", "ragged"])
@pytest.mark.parametrize(
    "options",
    [{}, {"k": 0.1}, {"keep": 7}, {"keep": 7, "trim_first_layer": False}, {"k": 0.1, "merge": True}],
    ids=str,
)
def test_a_static_cache_gives_the_dynamic_tokens_at_the_trimmed_length(model, samples, options):
    batch = tiny.inputs(*samples)
    with crosstrim.trim(model, **options) as trimmed:
        expected = generate(model, batch)
        selection = trimmed.report().samples
        out = generate(model, batch, cache_implementation="static")
        report = trimmed.report()
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)
    assert report.samples == selection
    longest = max(sum(image.kept for image in row) for row in selection)
    lengths = [out.past_key_values.layers[index].keys.shape[2] for index in tiny.CROSS_LAYERS]
    fixed = bucket(longest, 68)
    assert lengths == [68 if not options.get("trim_first_layer", True) else fixed, fixed, fixed]
    assert report.kv_bytes == sum(length * 2 * 4 * 8 * 4 * len(samples) for length in lengths)
    assert out.past_key_values.is_compileable


def test_eight_bits_in_a_static_cache_are_refused_and_nothing_is_cached(model):
    cache = StaticCache(model.config.text_config, max_cache_len=32)
    with crosstrim.trim(model, k=0.1, kv_dtype="int8"), pytest.raises(UnsupportedCacheError, match="leave kv_dtype"):
        generate(model, tiny.inputs(*SINGLE), past_key_values=cache)
    assert not any(layer.is_initialized for layer in cache.layers)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({"k": 0.1}, SINGLE),
        ({}, RAGGED),
        ({"keep": 7, "trim_first_layer": False}, SINGLE),
        ({"k": 0.1, "merge": True}, RAGGED),
    ],
    ids=["single", "lossless", "first layer whole", "merged"],
)
def test_compiled_decoding_gives_the_tokens_and_logits_of_the_dynamic_path(shallow_model, samples, options):
    model = shallow_model
    batch = tiny.inputs(*samples)
    with crosstrim.trim(model, **options):
        expected = generate(model, batch)
        out = generate(model, batch, cache_implementation="static", compile_config=compiled_config())
    assert graphs() == 1
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("merge", [False, True])
def test_requests_compile_once_for_a_bucket(shallow_model, merge):
    model = shallow_model
    requests = [tiny.inputs([2, Image(4, seed=seed), 9], seeds=[seed]) for seed in range(1, 4)]
    kept, made = [], []
    with crosstrim.trim(model, k=0.1, merge=merge) as trimmed:
        for request in requests:
            out = generate(model, request, cache_implementation="static", compile_config=compiled_config())
            kept.append(trimmed.report().kept)
            made.append(graphs())
            assert torch.equal(out.sequences, generate(model, request).sequences)
    buckets = [bucket(count, 68) for count in kept]
    assert len(set(kept)) > len(set(buckets)) > 1  # else this shows nothing
    assert made == [len(set(buckets[: place + 1])) for place in range(len(buckets))]


def test_a_prompt_with_images_is_not_compiled_in_one_graph(shallow_model):
    model = shallow_model
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with (
        torch.no_grad(),
        crosstrim.trim(model, k=0.1),
        pytest.raises(Exception, match="compile decoding steps alone"),
    ):
        compiled(**tiny.inputs(*SINGLE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "samples"),
    [({}, RAGGED), ({"k": 0.1, "kv_dtype": "int8"}, SINGLE), ({"k": 0.1, "merge": True}, RAGGED)],
    ids=["lossless", "eight bits", "merged"],
)
def test_a_prompt_compiled_with_graph_breaks_is_chosen_on_between_the_graphs(shallow_model, samples, options):
    model = shallow_model
    batch = tiny.inputs(*samples)
    with torch.no_grad(), crosstrim.trim(model, **options) as trimmed:
        expected, selection = model(**batch).logits, trimmed.report().samples
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(**batch).logits, expected, atol=1e-4, rtol=0)
            assert trimmed.report().samples == selection


@pytest.mark.parametrize("merge", [False, True])
def test_an_image_appended_to_a_static_cache(model, merge):
    two = tiny.inputs([2, Image(4), 8, Image(2, seed=1), 6])
    first, second = split_turns(two, 12)
    caches = [DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, max_cache_len=32)]
    logits = []
    with torch.no_grad(), crosstrim.trim(model, k=0.1, merge=merge) as trimmed:
        for cache in caches:
            model(**first, past_key_values=cache)
            logits.append(model(**second, past_key_values=cache).logits)
        assert trimmed.report(caches[0]).samples == trimmed.report(caches[1]).samples
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"k": 0.1}, {"keep": 7, "trim_first_layer": False}, {"keep": 7, "merge": True}],
    ids=str,
)
def test_compiled_decoding_without_a_mask(shallow_model, options):
    """The slots that fill the bucket up are nobody's, and nothing but the state says so."""
    model = shallow_model
    batch = tiny.inputs(*SINGLE)
    del batch["cross_attention_mask"]
    with crosstrim.trim(model, **options):
        expected = generate(model, batch)
        out = generate(model, batch, cache_implementation="static", compile_config=compiled_config())
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


def test_a_static_cache_that_served_untrimmed_and_was_reset_is_new(model):
    batch = tiny.inputs(*SINGLE)
    cache = StaticCache(model.config.text_config, max_cache_len=32)
    for index in tiny.CROSS_LAYERS:
        cache.layers[index] = StaticLayer(max_cache_len=68)
    generate(model, batch, past_key_values=cache)
    with crosstrim.trim(model, k=0.1), pytest.raises(UnsupportedCacheError, match=r"before trim\(\)"):
        model(**batch, past_key_values=copy.deepcopy(cache))
    cache.reset()
    with crosstrim.trim(model, k=0.1):
        out = generate(model, batch, past_key_values=cache)
        assert torch.equal(out.sequences, generate(model, batch).sequences)


@pytest.mark.parametrize("most", [68, 1601, 6404, 2 * 6404])
def test_a_bucket_is_at_most_a_sixteenth_more_and_never_more_than_everything(most):
    lengths = {length: bucket(length, most) for length in range(1, most + 1)}
    assert all(length <= found <= min(most, length * 17 / 16) for length, found in lengths.items())
    assert len(set(lengths.values())) <= 32 + 16 * most.bit_length()
    assert all(bucket(found, most) == found for found in lengths.values())


def test_half_of_an_image_of_the_real_model():
    assert (bucket(3202, 6404), bucket(6404, 6404), bucket(6300, 6404)) == (3328, 6404, 6400)


def test_where_nothing_is_dropped_a_static_cache_is_as_long_as_untrimmed(model):
    batch = tiny.inputs(*SINGLE)
    plain = generate(model, batch, cache_implementation="static")
    with crosstrim.trim(model):
        trimmed = generate(model, batch, cache_implementation="static")
    assert [layer.keys.shape for layer in trimmed.past_key_values.layers] == [
        layer.keys.shape for layer in plain.past_key_values.layers
    ]
