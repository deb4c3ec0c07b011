"""How many requests a pool of a fixed size holds at once: what trimming is for in a server."""

from __future__ import annotations

import pytest

import crosstrim
from crosstrim import mini
from tests.support import large_pictures, sglang_runs

pytestmark = pytest.mark.sglang

SLOTS = 5_300
TOKENS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return large_pictures.write(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def processor(checkpoint):
    return sglang_runs.processor_of(checkpoint)


def asked(processor, layout, count):
    rows = [row for row in mini.heldout() if row["layout"] == layout][:count]
    return [sglang_runs.request(processor, row["question"], [row["image"]], TOKENS) for row in rows]


@pytest.fixture(scope="module")
def untrimmed(tmp_path_factory, checkpoint, processor):
    """SGLang's own model, which gives every image the slots of four tiles."""
    folder = tmp_path_factory.mktemp("untrimmed")
    return sglang_runs.run(folder, checkpoint, asked(processor, "2x2", 7), trim=None, max_total_tokens=SLOTS)


@pytest.fixture(scope="module")
def half(tmp_path_factory, checkpoint, processor):
    folder = tmp_path_factory.mktemp("half")
    requests = asked(processor, "2x2", 13)
    return sglang_runs.run(folder, checkpoint, requests, trim={"keep": 0.5}, max_total_tokens=SLOTS)


@pytest.fixture(scope="module")
def lossless(tmp_path_factory, checkpoint, processor):
    folder = tmp_path_factory.mktemp("lossless")
    requests = asked(processor, "1x1", 23)
    return sglang_runs.run(folder, checkpoint, requests, trim={}, max_total_tokens=SLOTS)


def test_half_of_the_features_on_four_tiles(untrimmed, half):
    assert half.most_in_flight >= 1.8 * untrimmed.most_in_flight


def test_one_tile_of_four_loses_nothing_but_padding(untrimmed, lossless):
    assert lossless.most_in_flight >= 3.5 * untrimmed.most_in_flight


def test_the_tokens_are_those_of_transformers(half, lossless, checkpoint, processor):
    model = crosstrim.load(checkpoint)[0]
    few = asked(processor, "2x2", 4)
    assert half.tokens(0)[:4] == sglang_runs.reference(model, processor, few, keep=0.5)
    few = asked(processor, "1x1", 4)
    assert lossless.tokens(0)[:4] == sglang_runs.reference(model, processor, few)


def test_the_pool_is_free_again(untrimmed, half, lossless):
    assert [run.slots_in_use_at_the_end for run in (untrimmed, half, lossless)] == [0, 0, 0]
