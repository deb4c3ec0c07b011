"""Caches in eight bits: against caches in full whose keys and values were rounded by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import crosstrim
from crosstrim.method.quantisation import KV_DTYPES, Quantised
from crosstrim.trimming.cache import EightBitImageLayer, ImageLayer
from tests.support import tiny
from tests.support.passes import RAGGED, grow, split_turns
from tests.support.tiny import Image

HEADS, HEAD_SIZE = 4, 8
NEW = 5


def generate(model, batch, **options):
    options = {"max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True, **options}
    return model.generate(**batch, **options)


def layers(cache):
    return [cache.layers[index] for index in tiny.CROSS_LAYERS]


def filled(model, batch, **options):
    """The cache after the prompt, and the trim's report."""
    cache = DynamicCache()
    with torch.no_grad(), crosstrim.trim(model, **options) as trimmed:
        model(**batch, past_key_values=cache, use_cache=True)
        return cache, trimmed.report()


def rounded_by_hand(cache, kv_dtype):
    """The full cache with the numbers that eight bits can hold."""
    for layer in layers(cache):
        for name in ("keys", "values"):
            full = getattr(layer, name)
            setattr(layer, name, Quantised.of(full, kv_dtype).to_dtype(full.dtype))
    return cache


def go_on(model, cache, batch, **options):
    """Logits of three more tokens."""
    ids = torch.full((len(batch["input_ids"]), 3), 7)
    with torch.no_grad(), crosstrim.trim(model, **options):
        step = grow(batch, ids)
        step["input_ids"] = ids
        return model(**step, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize(
    "options", [{}, {"keep": 0.3}, {"k": 0.1, "trim_first_layer": False}, {"keep": 5, "merge": True}], ids=str
)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_decoding_reads_what_eight_bits_hold(model, options, kv_dtype):
    batch = tiny.inputs(*RAGGED)
    full, _ = filled(model, batch, **options)
    packed, _ = filled(model, batch, kv_dtype=kv_dtype, **options)
    unrounded = copy.deepcopy(full)
    for wide, narrow in zip(layers(full), layers(packed), strict=True):
        for name in ("keys", "values"):
            expected = Quantised.of(getattr(wide, name), kv_dtype).to_dtype(torch.float32)
            assert torch.equal(getattr(narrow, name), expected)
    found = go_on(model, packed, batch, kv_dtype=kv_dtype, **options)
    assert torch.equal(found, go_on(model, rounded_by_hand(full, kv_dtype), batch, **options))
    assert not torch.equal(found, go_on(model, unrounded, batch, **options))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_answer_begins_as_in_full(model, kv_dtype):
    batch = tiny.inputs(*RAGGED)
    with crosstrim.trim(model, keep=0.3):
        full = generate(model, batch)
    with crosstrim.trim(model, keep=0.3, kv_dtype=kv_dtype) as trimmed:
        packed = generate(model, batch)
        assert trimmed.report().config.kv_dtype == kv_dtype
    assert torch.equal(packed.logits[0], full.logits[0])  # the prompt is read before anything is packed
    assert not torch.equal(packed.logits[1], full.logits[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_bytes_are_those_of_the_held_tensors(model, kv_dtype, dtype):
    model.to(dtype)
    batch = tiny.inputs([2, Image(4), 9])
    _, full_report = filled(model, batch, keep=20)
    cache, report = filled(model, batch, keep=20, kv_dtype=kv_dtype)
    per_feature = 2 * len(tiny.CROSS_LAYERS) * HEADS
    assert full_report.kv_bytes == 20 * per_feature * HEAD_SIZE * dtype.itemsize
    assert report.kv_bytes == 20 * per_feature * (HEAD_SIZE + 2)
    assert report.kv_bytes_untrimmed == full_report.kv_bytes_untrimmed
    held = {
        id(storage): storage.nbytes()
        for layer in layers(cache)
        for tensor in layer.held()
        for storage in [tensor.untyped_storage()]
    }
    assert sum(held.values()) == report.kv_bytes  # and nothing wide is behind them
    assert layers(cache)[0].keys.dtype == dtype


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_packed_layers_follow_their_batch(model, kv_dtype):
    batch = tiny.inputs(*RAGGED)
    cache, _ = filled(model, batch, keep=0.3, kv_dtype=kv_dtype)
    before = [(layer.keys, layer.values, layer.kept.slots) for layer in layers(cache)]
    order = torch.tensor([1, 0])
    moves = [
        (lambda one: one.reorder_cache(order), lambda tensor: tensor[order]),
        (lambda one: one.batch_repeat_interleave(2), lambda tensor: tensor.repeat_interleave(2, 0)),
        (lambda one: one.batch_select_indices(order[:1]), lambda tensor: tensor[order[:1]]),
        (lambda one: one.crop(-2), lambda tensor: tensor),
        (lambda one: [layer.offload() for layer in layers(one)], lambda tensor: tensor),
        (lambda one: [layer.prefetch() for layer in layers(one)], lambda tensor: tensor),
    ]
    for move, expected in moves:
        moved = copy.deepcopy(cache)
        move(moved)
        for layer, tensors in zip(layers(moved), before, strict=True):
            assert isinstance(layer, EightBitImageLayer)
            assert not layer._written
            for found, tensor in zip((layer.keys, layer.values, layer.kept.slots), tensors, strict=True):
                assert torch.equal(found, expected(tensor))
            assert layer.get_seq_length() == tensors[0].shape[2]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_copy_is_a_copy(model, kv_dtype):
    batch = tiny.inputs(*RAGGED)
    cache, _ = filled(model, batch, keep=0.3, kv_dtype=kv_dtype)
    twin = copy.deepcopy(cache)
    for tensor in layers(cache)[0].held():
        tensor.view(torch.uint8).zero_()
    assert layers(twin)[0].keys.any()
    assert not layers(cache)[0].keys.any()


@pytest.mark.parametrize("later", [{"kv_dtype": "int8"}, {}], ids=str)
def test_an_appended_image_is_packed_and_what_was_packed_stays(model, later):
    two = tiny.inputs([2, Image(4), 9, Image(3, seed=4), 5])
    first, second = split_turns(two, 13)
    cache = DynamicCache()
    with torch.no_grad(), crosstrim.trim(model, keep=6, kv_dtype="int8"):
        model(**first, past_key_values=cache, use_cache=True)
    before = [[tensor.clone() for tensor in layer.held()] for layer in layers(cache)]
    with torch.no_grad(), crosstrim.trim(model, keep=6, **later) as trimmed:
        model(**second, past_key_values=cache, use_cache=True)
        report = trimmed.report()
    assert [image.kept for image in report.samples[0]] == [6, 6]
    for layer, tensors in zip(layers(cache), before, strict=True):
        assert len(layer.held()) == len(tensors) == 4
        for now, then in zip(layer.held(), tensors, strict=True):
            assert now.shape[2] == 12
            assert torch.equal(now[:, :, :6], then)


def test_a_cache_in_full_goes_on_in_full(model):
    two = tiny.inputs([2, Image(4), 9, Image(3, seed=4), 5])
    first, second = split_turns(two, 13)
    cache = DynamicCache()
    with torch.no_grad(), crosstrim.trim(model, keep=6):
        model(**first, past_key_values=cache, use_cache=True)
    with torch.no_grad(), crosstrim.trim(model, keep=6, kv_dtype="int8"):
        model(**second, past_key_values=cache, use_cache=True)
    assert all(type(layer) is ImageLayer for layer in layers(cache))


def test_a_reset_cache_starts_anew(model):
    batch = tiny.inputs(*RAGGED)
    cache, _ = filled(model, batch, keep=0.3, kv_dtype="int8")
    expected = [layer.keys for layer in layers(cache)]
    for layer in layers(cache):
        layer.reset()
    assert [layer.get_seq_length() for layer in layers(cache)] == [0, 0, 0]
    fresh = DynamicCache(config=model.config.text_config)
    for index in tiny.CROSS_LAYERS:
        fresh.layers[index] = cache.layers[index]
    with torch.no_grad(), crosstrim.trim(model, keep=0.3, kv_dtype="int8"):
        model(**batch, past_key_values=fresh, use_cache=True)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(layers(cache), expected, strict=True))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generation_runs_in_every_mode(model, options):
    batch = tiny.inputs(*RAGGED)
    with crosstrim.trim(model, keep=0.3, kv_dtype="int8"):
        found = generate(model, batch, **options)
    assert found.sequences.shape[1] == batch["input_ids"].shape[1] + NEW


def test_an_unrepaired_model_packs_after_the_prompt_too(raw_model):
    batch = tiny.inputs([2, Image(1), 9])
    with pytest.warns(crosstrim.errors.CompatWarning):
        cache, report = filled(raw_model, batch, kv_dtype="fp8")
    assert report.kept == tiny.FEATURES_PER_TILE
    assert all(isinstance(layer, EightBitImageLayer) and not layer._written for layer in layers(cache))
