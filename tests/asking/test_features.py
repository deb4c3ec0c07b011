"""The store of image features: what it finds, what it encodes, what it lets go."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from crosstrim import FeatureCache
from crosstrim.asking.features import digests
from crosstrim.errors import ConfigError
from crosstrim.models import compat, vision
from tests.support import tiny
from tests.support.tiny import Image
from tests.support.tower import counted

BATCH = [[Image(4), 3, Image(2, seed=1), 2], [Image(1, seed=2), 4]]
SINGLE = tiny.inputs([Image(4), 3])
OTHER = tiny.inputs([Image(4, seed=7), 3])


@pytest.fixture
def tower(model):
    with counted(model) as passes:
        yield passes


def test_features_are_those_of_the_vision_tower(model, tower):
    batch, cache = tiny.inputs(*BATCH), FeatureCache()
    expected = vision.encode(model, batch)
    for _ in range(2):
        found = cache.features(model, batch)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert tower == [2, 4]  # three pictures and an empty slot


def test_a_picture_is_known_by_its_content_wherever_it_stands(model, tower):
    cache = FeatureCache()
    first = cache.features(model, SINGLE)
    again = cache.features(model, tiny.inputs([Image(4), 3], [Image(4), 1], [Image(4, seed=7), 1]))
    assert tower == [1, 1]
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[0])
    assert len(cache) == 2


@pytest.mark.parametrize("name", ["pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"])
def test_everything_that_the_tower_reads_tells_pictures_apart(name):
    changed = SINGLE[name].clone()
    changed.view(-1)[-1] += 1
    assert digests({**SINGLE, name: changed}) != digests(SINGLE)
    assert digests({**SINGLE, name: SINGLE[name].clone()}) == digests(SINGLE)


def test_models_dtypes_and_repairs_do_not_mix(model, raw_model):
    cache = FeatureCache()
    repaired, raw = cache.features(model, SINGLE), cache.features(raw_model, SINGLE)
    assert not torch.allclose(repaired, raw)
    with compat.apply(raw_model):
        torch.testing.assert_close(cache.features(raw_model, SINGLE), repaired)
    assert torch.equal(cache.features(raw_model, SINGLE), raw)
    assert cache.features(model.to(torch.bfloat16), SINGLE).dtype == torch.bfloat16
    assert len(cache) == 4


def test_what_was_used_longest_ago_goes_first(model, tower):
    size = FeatureCache()
    size.features(model, SINGLE)
    cache = FeatureCache(max_bytes=2 * size.bytes)
    pictures = [tiny.inputs([Image(4, seed=seed), 1]) for seed in range(3)]
    tower.clear()
    for place in (0, 1, 0, 2, 0, 1):
        cache.features(model, pictures[place])
        assert cache.bytes <= cache.max_bytes
    assert len(tower) == 4  # 0, 1, 2, and 1 again
    assert (len(cache), cache.bytes) == (2, cache.max_bytes)
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_held_features_keep_no_batch_alive(model):
    cache = FeatureCache()
    cache.features(model, tiny.inputs(*BATCH))
    for features in cache._held.values():
        assert features.untyped_storage().nbytes() == features.numel() * features.element_size()


def test_a_picture_larger_than_the_store_is_encoded_every_time(model, tower):
    cache = FeatureCache(max_bytes=10)
    first, second = cache.features(model, SINGLE), cache.features(model, SINGLE)
    assert torch.equal(first, second)
    assert (tower, len(cache)) == ([1, 1], 0)


def test_features_can_be_held_elsewhere(model):
    cache = FeatureCache(device="meta")  # holds nothing, so what is read back shows where it was
    assert not cache.features(model, SINGLE).is_meta
    assert all(features.is_meta for features in cache._held.values())


def test_threads_that_want_one_picture_encode_it_once(model, tower):
    cache, found = FeatureCache(), []
    model.model.vision_model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    begin = threading.Barrier(6)

    def work(place):
        begin.wait()
        found.append(cache.features(model, OTHER if place % 3 == 0 else SINGLE))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), tower, len(cache)) == (6, [1, 1], 2)


def test_a_picture_that_cannot_be_encoded_leaves_nothing(model):
    cache = FeatureCache()
    bad = {**SINGLE, "pixel_values": SINGLE["pixel_values"][..., :-1]}
    with pytest.raises(RuntimeError):
        cache.features(model, bad)
    assert len(cache) == 0
    cache.features(model, SINGLE)  # and the store is not stuck
    assert len(cache) == 1


@pytest.mark.parametrize(
    ("options", "wording"),
    [({"max_bytes": -1}, "0 or more"), ({"max_bytes": 1.5}, "whole number"), ({"device": "toaster"}, "is no device")],
)
def test_bad_options(options, wording):
    with pytest.raises(ConfigError, match=wording):
        FeatureCache(**options)
