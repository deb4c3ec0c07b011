"""A trim that is taken off while a generation still needs it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import crosstrim
from crosstrim.errors import UnsupportedCacheError
from crosstrim.models.names import cache_keyword
from tests.support import tiny
from tests.support.passes import grow
from tests.support.tiny import Image

SINGLE = [2, Image(4), 9]
REMOVED = r"filled by a trim that was removed since.*let generation end before remove\(\)"


class Tokens(BaseStreamer):
    """Lets the first tokens through and then waits to be told to go on."""

    def __init__(self):
        self.begun, self.go_on, self.seen = threading.Event(), threading.Event(), 0

    def put(self, value):
        self.seen += 1
        if self.seen == 3:
            self.begun.set()
            assert self.go_on.wait(60)

    def end(self):
        pass


@pytest.mark.parametrize(
    "options", [{"k": 0.1}, {"keep": 7, "trim_first_layer": False}, {"keep": 7, "kv_dtype": "int8"}]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_block_left_while_a_thread_generates(model, options, attention):
    model.set_attn_implementation(attention)
    streamer, errors = Tokens(), []

    def generate():
        try:
            model.generate(**tiny.inputs(SINGLE), max_new_tokens=8, streamer=streamer)
        except UnsupportedCacheError as error:
            errors.append(error)

    with crosstrim.trim(model, **options):
        thread = threading.Thread(target=generate)
        thread.start()
        assert streamer.begun.wait(60)
    streamer.go_on.set()
    thread.join(60)
    with pytest.raises(UnsupportedCacheError, match=REMOVED):
        raise errors[0]


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("options", [{"keep": 7}, {"keep": 7, "trim_first_layer": False}], ids=str)
def test_a_block_left_in_the_middle_of_a_prompt(model, place, options):
    """The layers that are left then run untrimmed, and only what the others cached tells."""
    batch, held = tiny.inputs(SINGLE), {cache_keyword(): DynamicCache(config=model.config.text_config)}
    step = one_more(batch)
    trimmed_layers = tiny.CROSS_LAYERS if options.get("trim_first_layer", True) else tiny.CROSS_LAYERS[1:]
    handle = crosstrim.trim(model, **options)
    hook = model.model.language_model.layers[place].register_forward_hook(lambda *_: handle.remove())
    with torch.no_grad():
        model(**batch, **held)
        hook.remove()
        if place < trimmed_layers[0]:
            fresh = {cache_keyword(): DynamicCache(config=model.config.text_config)}
            model(**batch, **fresh)
            torch.testing.assert_close(model(**step, **held).logits, model(**step, **fresh).logits)
        else:
            with pytest.raises(UnsupportedCacheError, match=REMOVED):
                model(**step, **held)


def one_more(batch):
    grown = grow(batch, torch.tensor([[5]]))
    return {"input_ids": grown["input_ids"][:, -1:], "cross_attention_mask": grown["cross_attention_mask"]}


def test_what_is_left_may_be_looked_at_and_goes_on_under_another_trim(model):
    batch = tiny.inputs(SINGLE)
    held = {cache_keyword(): DynamicCache(config=model.config.text_config)}
    step = one_more(batch)
    with torch.no_grad():
        with crosstrim.trim(model, keep=7) as trimmed:
            model(**batch, **held)
            copied = copy.deepcopy(held)
            expected = model(**step, **copy.deepcopy(held)).logits
        (cache,) = held.values()
        assert cache.layers[tiny.CROSS_LAYERS[1]].keys.shape[2] == 7
        assert trimmed.report(cache).kept == 7
        cache.batch_repeat_interleave(1)
        with pytest.raises(UnsupportedCacheError, match=REMOVED):
            model(**step, **copied)
        with crosstrim.trim(model):
            assert torch.equal(model(**step, **held).logits, expected)


def test_a_cache_that_nothing_was_dropped_from_goes_on_untrimmed(model):
    batch = tiny.inputs(SINGLE)
    step = {
        "input_ids": torch.tensor([[5]]),
        "cross_attention_mask": grow(batch, torch.tensor([[5]]))["cross_attention_mask"],
    }
    with torch.no_grad():
        held = {cache_keyword(): DynamicCache(config=model.config.text_config)}
        model(**batch, **held)
        expected = model(**step, **held).logits
        held = {cache_keyword(): DynamicCache(config=model.config.text_config)}
        with crosstrim.trim(model):
            model(**batch, **held)
        torch.testing.assert_close(model(**step, **held).logits, expected)
