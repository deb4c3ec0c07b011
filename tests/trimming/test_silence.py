"""Situations that could give a wrong answer without a word."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from transformers import DynamicCache

import crosstrim
from crosstrim.errors import AlreadyTrimmedError, CompatWarning, CrosstrimError, UnsupportedCacheError
from tests.support import tiny
from tests.support.passes import SINGLE, generate, grow, kept, split_turns
from tests.support.tiny import Image

PICTURE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def new_cache(model):
    return DynamicCache(config=model.config.text_config)


def beginning(batch, rows):
    return {name: tensor if name in PICTURE else tensor[:, :rows] for name, tensor in batch.items()}


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("whole", [True, False], ids=["first layer whole", "first layer trimmed"])
def test_a_cache_goes_on_as_it_was_filled_under_another_trim_of_the_first_layer(model, whole, masked, kv_dtype):
    batch = tiny.inputs([2, Image(4), 9], [3, Image(4, seed=3), 8])
    later = grow(batch, torch.tensor([[7], [8]]))
    step = {"input_ids": later["input_ids"][:, -1:], "attention_mask": later["attention_mask"]}
    if masked:
        step["cross_attention_mask"] = later["cross_attention_mask"]
    options = {"keep": 9, "kv_dtype": kv_dtype}
    with torch.no_grad():
        with crosstrim.trim(model, **options, trim_first_layer=not whole):
            cache = model(**batch, past_key_values=new_cache(model)).past_key_values
            expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        with crosstrim.trim(model, **options, trim_first_layer=whole):
            torch.testing.assert_close(model(**step, past_key_values=cache).logits, expected)


def test_an_image_appended_under_another_trim_of_the_first_layer(model):
    two = tiny.inputs([2, Image(4), 8, Image(2, seed=1), 6])
    first, second = split_turns(two, 12)
    with torch.no_grad():
        with crosstrim.trim(model, keep=9, trim_first_layer=False):
            cache = model(**first, past_key_values=new_cache(model)).past_key_values
            expected = model(**second, past_key_values=copy.deepcopy(cache)).logits
        with crosstrim.trim(model, keep=9):
            torch.testing.assert_close(model(**second, past_key_values=cache).logits, expected)
    assert cache.layers[tiny.CROSS_LAYERS[0]].keys.shape[2] == 2 * 68


@pytest.mark.parametrize("options", [{}, {"keep": 9}], ids=["lossless", "keep"])
@pytest.mark.parametrize("wanted", [2, 5, 14, 1000])
def test_asking_for_the_logits_of_several_rows_changes_no_choice(model, options, wanted):
    batch = tiny.inputs(SINGLE)
    with torch.no_grad(), crosstrim.trim(model, **options) as trimmed:
        expected = model(**batch, past_key_values=new_cache(model)).logits
        selection = kept(trimmed)
        got = model(**batch, past_key_values=new_cache(model), logits_to_keep=wanted).logits
        assert kept(trimmed) == selection
    torch.testing.assert_close(got, expected[:, -wanted:])


def test_a_pass_with_a_cache_of_its_own_never_takes_the_choice_of_one_without(model):
    whole = tiny.inputs([2, Image(4), 15])
    with torch.no_grad():
        with crosstrim.trim(model, keep=6) as trimmed:
            model(**whole)
            expected = kept(trimmed)
        with crosstrim.trim(model, keep=6) as trimmed:
            model(**beginning(whole, 13), use_cache=False)
            assert kept(trimmed) != expected
            model(**whole)
            assert kept(trimmed) == expected


def overwritten(batch):
    batch["pixel_values"].copy_(tiny.inputs([2, Image(4, seed=5), 9])["pixel_values"])


def hidden(batch):
    batch["cross_attention_mask"][..., 2:] = 0


@pytest.mark.parametrize("change", [overwritten, hidden], ids=["pixels", "mask"])
def test_without_a_cache_what_was_changed_in_place_is_selected_anew(model, change):
    batch = tiny.inputs(SINGLE)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    change(other)
    with torch.no_grad():
        with crosstrim.trim(model, keep=6) as trimmed:
            model(**other, use_cache=False)
            expected = kept(trimmed)
        with crosstrim.trim(model, keep=6) as trimmed:
            model(**batch, use_cache=False)
            assert kept(trimmed) != expected
            change(batch)
            model(**batch, use_cache=False)
            assert kept(trimmed) == expected


def test_without_a_cache_training_selects_anew_at_every_step(model):
    model = copy.deepcopy(model)
    batch = tiny.inputs(SINGLE)
    with crosstrim.trim(model, keep=6) as trimmed:
        model(**batch, use_cache=False)
        first = kept(trimmed)
        with torch.no_grad():
            attention = model.model.language_model.layers[tiny.CROSS_LAYERS[0]].cross_attn
            attention.q_proj.weight.neg_()
        model(**batch, use_cache=False)
        assert kept(trimmed) != first


def test_a_compilation_in_another_thread_changes_nothing(model):
    """Process-wide, torch only knows that something is being compiled."""
    batch, begun, done = tiny.inputs(SINGLE), threading.Event(), threading.Event()

    def slow(graph, examples):
        begun.set()
        assert done.wait(60)
        return graph.forward

    compiled = torch.compile(lambda number: number * 2, backend=slow)
    with crosstrim.trim(model, keep=6):
        expected = generate(model, batch)
        other = threading.Thread(target=compiled, args=(torch.ones(3),))
        other.start()
        assert begun.wait(60)
        try:
            got = generate(model, batch)
        finally:
            done.set()
            other.join()
    assert torch.equal(got, expected)


def test_a_trim_that_was_taken_off_is_not_put_on_by_a_second_block(model):
    batch = tiny.inputs(SINGLE)
    with crosstrim.trim(model, keep=6) as trimmed:
        expected = generate(model, batch)
    for again in (trimmed.__enter__, trimmed.disabled().__enter__):
        with pytest.raises(CrosstrimError, match=r"this trim was removed; call crosstrim\.trim again"):
            again()
    with crosstrim.trim(model, keep=6) as trimmed:
        with trimmed:
            generate(model, batch)
        assert torch.equal(generate(model, batch), expected)  # the outer block is still trimmed


def test_a_trim_whose_handle_was_lost_can_be_taken_off(model):
    crosstrim.trim(model, k=0.1)
    with pytest.raises(AlreadyTrimmedError, match=r"or on this error's `handle`") as refused:
        crosstrim.trim(model, k=0.1)
    refused.value.handle.remove()
    crosstrim.trim(model, k=0.1).remove()


@pytest.mark.parametrize("name", ["q_norm", "k_norm", "v_proj", "o_proj"])
def test_a_part_that_was_replaced_after_trim_is_the_one_that_counts(model, name):
    """An adapter, say. The choice is made where the layer attends, on what its parts made by then."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, numbers):
            return self.base(numbers) * torch.linspace(0.1, 2, self.base(numbers).shape[-1])

    attention = model.model.language_model.layers[tiny.CROSS_LAYERS[0]].cross_attn
    batch = tiny.inputs(SINGLE)
    with torch.no_grad():
        with crosstrim.trim(model, keep=6) as trimmed:
            setattr(attention, name, Adapter(getattr(attention, name)))
            got, selection = model(**batch).logits, kept(trimmed)
        with crosstrim.trim(model, keep=6) as trimmed:
            assert torch.equal(model(**batch).logits, got)
            assert kept(trimmed) == selection


def test_a_compiled_first_layer_chooses_as_the_layer_itself(model):
    batch = tiny.inputs(SINGLE)
    with torch.no_grad(), crosstrim.trim(model, keep=6) as trimmed:
        expected = generate(model, batch)
        selection = kept(trimmed)
    attention = model.model.language_model.layers[tiny.CROSS_LAYERS[0]].cross_attn
    attention.compile(backend="eager")
    with torch.no_grad(), crosstrim.trim(model, keep=6) as trimmed:
        assert torch.equal(generate(model, batch), expected)
        assert kept(trimmed) == selection


def test_an_interruption_holds_no_picture(model):
    batch = tiny.inputs(SINGLE)
    pixels = weakref.ref(batch["pixel_values"])

    def interrupt(*_):
        raise KeyboardInterrupt

    with crosstrim.trim(model, keep=6):
        hook = model.model.language_model.layers[tiny.CROSS_LAYERS[1]].mlp.register_forward_hook(interrupt)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(**batch)
        hook.remove()
        del batch
        gc.collect()
        assert pixels() is None


@pytest.mark.parametrize("seen", [[3], []], ids=["a tile of its own", "nothing"])
@pytest.mark.parametrize("repaired", [True, False])
def test_what_generated_tokens_see_is_what_a_last_row_of_padding_sees(model, raw_model, repaired, seen):
    model = model if repaired else raw_model
    batch = tiny.inputs(SINGLE)
    batch["attention_mask"][:, -2:] = 0
    batch["cross_attention_mask"][:, :, :, 2:] = 0
    batch["cross_attention_mask"][:, -1] = 0
    batch["cross_attention_mask"][:, -1, :, seen] = 1
    options = {"output_logits": True, "return_dict_in_generate": True}
    expected = generate(model, batch, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatWarning)
        with crosstrim.trim(model):
            got = generate(model, batch, **options)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_trimmed_model_is_not_copied(model, copied):
    with (
        crosstrim.trim(model, k=0.1),
        pytest.raises(CrosstrimError, match=r"cannot be copied or pickled; remove\(\)"),
    ):
        copied(model)


def test_what_people_print_is_short(model):
    with crosstrim.trim(model, k=0.1) as trimmed:
        generate(model, tiny.inputs(SINGLE))
        assert repr(trimmed).startswith("<TrimHandle on: TrimConfig(k=0.1,")
        assert "kept_indices" not in repr(trimmed.report())
    assert repr(trimmed).startswith("<TrimHandle removed: ")


@pytest.mark.parametrize("second", [False, True], ids=["first picture", "second picture"])
def test_a_cache_that_a_failed_pass_left_half_filled_is_refused(model, second):
    two = tiny.inputs([2, Image(4), 8, Image(2, seed=1), 6])
    first, then = split_turns(two, 12)
    cache = new_cache(model)
    with torch.no_grad(), crosstrim.trim(model, keep=6):
        if second:
            model(**first, past_key_values=cache)
        hook = model.model.language_model.layers[tiny.CROSS_LAYERS[1]].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**(then if second else first), past_key_values=cache)
        hook.remove()
        with pytest.raises(UnsupportedCacheError, match=r"ended before all layers.*start with an empty cache"):
            model(**then, past_key_values=cache)
