"""The handle: put on, taken off, switched off, in threads, and what it refuses."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import crosstrim
from crosstrim import TrimConfig
from crosstrim.errors import (
    AlreadyTrimmedError,
    CompatWarning,
    ConfigError,
    CrosstrimError,
    InputError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from tests.support import tiny
from tests.support.passes import OLD_TRANSFORMERS, SINGLE, generate, grow, hooks_on
from tests.support.tiny import Image


def test_leaves_nothing_behind(model):
    batch, before = tiny.inputs(SINGLE), hooks_on(model)
    attributes = [set(vars(module)) for module in model.modules()]
    expected = generate(model, batch)
    handle = crosstrim.trim(model, k=0.1)
    assert hooks_on(model) > before
    trimmed = generate(model, batch)
    handle.remove()
    handle.remove()
    assert hooks_on(model) == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(generate(model, batch), expected)
    assert not torch.equal(trimmed, expected)


class Boom(RuntimeError):
    pass


@pytest.mark.parametrize("place", ["in the block", "in a follower", "in the leader", "in the vision tower"])
def test_an_exception_leaves_no_hook_and_no_half_done_pass(model, place):
    batch, before = tiny.inputs(SINGLE), hooks_on(model)
    modules = {
        "in a follower": model.model.language_model.layers[tiny.CROSS_LAYERS[2]].mlp,
        "in the leader": model.model.language_model.layers[tiny.CROSS_LAYERS[0]].cross_attn.k_norm,
        "in the vision tower": model.model.vision_model.global_transformer,
    }

    def explode(module, args):
        raise Boom

    hook = modules[place].register_forward_pre_hook(explode) if place in modules else None
    with crosstrim.trim(model, k=0.1) as trimmed:
        if hook is not None:
            with pytest.raises(Boom):
                generate(model, batch)
            hook.remove()
            with pytest.raises(CrosstrimError, match="nothing was generated yet"):
                trimmed.report()
        again = generate(model, batch)
        expected_report = trimmed.report()
    assert hooks_on(model) == before
    with crosstrim.trim(model, k=0.1) as trimmed:
        assert torch.equal(generate(model, batch), again)
        assert trimmed.report() == expected_report
    with pytest.raises(Boom), crosstrim.trim(model, k=0.1):
        raise Boom
    assert hooks_on(model) == before


def test_disabled_is_the_untrimmed_model_for_this_thread_only(model):
    batch = tiny.inputs(SINGLE)
    expected = generate(model, batch)
    results = {}
    with crosstrim.trim(model, k=0.1) as trimmed:
        on = generate(model, batch)
        with trimmed.disabled():
            off = generate(model, batch)
            other = threading.Thread(target=lambda: results.update(other=generate(model, batch)))
            other.start()
            other.join()
        assert torch.equal(generate(model, batch), on)
    assert torch.equal(off, expected)
    assert torch.equal(results["other"], on)


def test_a_trimmed_cache_cannot_go_on_untrimmed(model):
    batch = tiny.inputs(SINGLE)
    with torch.no_grad(), crosstrim.trim(model, k=0.1) as trimmed:
        cache = model(**batch).past_key_values
        with trimmed.disabled(), pytest.raises(UnsupportedCacheError, match="start a new generation"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_an_untrimmed_cache_goes_on_untrimmed_but_takes_no_new_image(model):
    batch = tiny.inputs(SINGLE)
    step = {"input_ids": torch.tensor([[5]]), "cross_attention_mask": batch["cross_attention_mask"][:, -1:]}
    if OLD_TRANSFORMERS:
        step["cross_attention_mask"] = torch.cat([batch["cross_attention_mask"], step["cross_attention_mask"]], 1)
    with torch.no_grad():
        cache = model(**batch).past_key_values
        expected = model(**step, past_key_values=model(**batch).past_key_values).logits
        with crosstrim.trim(model, k=0.1):
            assert torch.equal(model(**step, past_key_values=cache).logits, expected)
            with pytest.raises(UnsupportedCacheError, match="cached before trim"):
                model(**batch, past_key_values=cache)


def test_two_threads_give_what_each_gives_alone(model):
    batches = [tiny.inputs([2, Image(4), 9]), tiny.inputs([1, Image(2, seed=3), 14], [3, Image(4, seed=4), 5])]
    with crosstrim.trim(model, k=0.1) as trimmed:

        def run(batch):
            out = generate(model, batch, return_dict_in_generate=True)
            return out.sequences, trimmed.report(out.past_key_values).samples

        alone = [run(batch) for batch in batches]
        together = [[], []]
        barrier = threading.Barrier(2)

        def work(place):
            barrier.wait()
            for _ in range(8):
                together[place].append(run(batches[place]))

        threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for place in range(2):
        assert len(together[place]) == 8
        for sequences, samples in together[place]:
            assert torch.equal(sequences, alone[place][0])
            assert samples == alone[place][1]


def test_state_dies_with_its_cache(model):
    import gc
    import weakref

    batch = tiny.inputs(SINGLE)
    with torch.no_grad(), crosstrim.trim(model, k=0.1):
        cache = model(**batch).past_key_values
        gone = weakref.ref(cache.layers[tiny.CROSS_LAYERS[0]].keys)
        uncached = {name: tensor.clone() for name, tensor in batch.items()}
        model(**uncached, use_cache=False)
        pixels = weakref.ref(uncached["pixel_values"])
        del cache, uncached
        gc.collect()
        assert gone() is None
        assert pixels() is None


def test_trimming_twice_is_refused_and_changes_nothing(model):
    with crosstrim.trim(model, k=0.1):
        before = hooks_on(model)
        with pytest.raises(AlreadyTrimmedError, match=r"call remove\(\)"):
            crosstrim.trim(model, keep=0.5)
        assert hooks_on(model) == before


def test_a_warning_made_an_error_leaves_no_hook(raw_model):
    before = hooks_on(raw_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CompatWarning):
            crosstrim.trim(raw_model, k=0.1)
    assert hooks_on(raw_model) == before


def test_images_that_the_cache_holds_already_are_refused_with_the_remedy(model):
    batch = tiny.inputs(SINGLE)
    with torch.no_grad(), crosstrim.trim(model, k=0.1):
        cache = DynamicCache(config=model.config.text_config)
        first = generate(model, batch, past_key_values=cache)
        again = grow(batch, first[:, batch["input_ids"].shape[1] :])
        images = {name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        with pytest.raises(InputError, match=r"is for 1 images, but the cache holds 1 and this pass brings 1"):
            generate(model, again | images, past_key_values=copy.deepcopy(cache))
        two = again | {"cross_attention_mask": again["cross_attention_mask"].repeat(1, 1, 2, 1)}
        with pytest.raises(InputError, match=r"is for 2 images, but the cache holds 1 and this pass brings 0"):
            generate(model, two, past_key_values=copy.deepcopy(cache))
        assert generate(model, again, past_key_values=cache).shape[1] == again["input_ids"].shape[1] + 6


def test_a_cache_that_was_reset_starts_anew(model):
    batch = tiny.inputs(SINGLE)
    with torch.no_grad(), crosstrim.trim(model, k=0.1):
        cache = DynamicCache(config=model.config.text_config)
        expected = model(**batch, past_key_values=cache).logits
        for index in tiny.CROSS_LAYERS:
            cache.layers[index].reset()
        fresh = DynamicCache(config=model.config.text_config)
        for index in tiny.CROSS_LAYERS:
            fresh.layers[index] = cache.layers[index]
        assert torch.equal(model(**batch, past_key_values=fresh).logits, expected)


def test_text_alone_may_use_any_cache(model):
    if OLD_TRANSFORMERS:
        pytest.skip("its static cache has no room for Mllama, trimmed or not")
    batch = tiny.inputs([6])
    expected = generate(model, batch, cache_implementation="static")
    with crosstrim.trim(model, k=0.1):
        assert torch.equal(generate(model, batch, cache_implementation="static"), expected)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "wording"),
    [
        ((), {"k": 2}, ConfigError, "k=2 must be"),
        ((), {"k": 0.1, "keep": 0.1}, ConfigError, "give one of them"),
        ((), {"kepe": 0.1}, ConfigError, "unknown option 'kepe'"),
        ((TrimConfig(k=0.1),), {"k": 0.1}, ConfigError, "not both"),
        ((0.25,), {}, ConfigError, r"did you mean trim\(model, k=0.25\)"),
    ],
)
def test_bad_options_change_nothing(model, arguments, options, error, wording):
    before = hooks_on(model)
    with pytest.raises(error, match=wording):
        crosstrim.trim(model, *arguments, **options)
    assert hooks_on(model) == before


def test_models_without_cross_attention_are_refused():
    text = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM holds no Mllama.*supports Mllama"):
        crosstrim.trim(text)
    with pytest.raises(UnsupportedModelError, match="expected a loaded model, got str"):
        crosstrim.trim("meta-llama/Llama-3.2-11B-Vision-Instruct")
    assert hooks_on(text) == 0


def test_a_model_inside_a_wrapper_is_found(model):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    batch = tiny.inputs(SINGLE)
    with crosstrim.trim(model, k=0.1):
        expected = generate(model, batch)
    with crosstrim.trim(Wrapper(model), k=0.1):
        assert torch.equal(generate(model, batch), expected)
    with pytest.raises(UnsupportedModelError, match="holds 2 Mllama models"):
        crosstrim.trim(torch.nn.ModuleList([model, tiny.build(seed=1)]))


def test_a_config_object_and_options_mean_the_same(model):
    batch = tiny.inputs(SINGLE)
    with crosstrim.trim(model, TrimConfig(keep=0.2)) as trimmed:
        by_config = generate(model, batch)
    with crosstrim.trim(model, keep=0.2) as same:
        assert torch.equal(generate(model, batch), by_config)
    assert trimmed.config == same.config


def test_the_random_policy_keeps_as_many_and_others(model):
    batch = tiny.inputs(SINGLE)
    with torch.no_grad(), crosstrim.trim(model, keep=0.2) as trimmed:
        model(**batch)
        union = trimmed.report().samples[0][0]
    with torch.no_grad(), crosstrim.trim(model, keep=0.2, policy="random") as trimmed:
        model(**batch)
        random = trimmed.report().samples[0][0]
    assert random.kept == union.kept
    assert random.kept_indices != union.kept_indices


def test_reports(model):
    batch = tiny.inputs([2, Image(4), 5, Image(1, seed=1), 4], [9])
    with torch.no_grad(), crosstrim.trim(model, keep=3) as trimmed:
        with pytest.raises(CrosstrimError, match="nothing was generated yet"):
            trimmed.report()
        cache = model(**batch).past_key_values
        report = trimmed.report(cache)
        with pytest.raises(CrosstrimError, match="holds no trimmed image features"):
            trimmed.report(DynamicCache())
    assert [len(row) for row in report.samples] == [2, 0]
    first, second = report.samples[0]
    assert (first.features, first.visible, first.kept) == (68, 68, 3)
    assert (second.features, second.visible, second.kept) == (68, 17, 3)
    assert min(second.kept_indices) >= 68  # counted through the whole prompt
    values = report.to_dict()
    assert set(values) == {
        "samples",
        "kv_bytes",
        "kv_bytes_untrimmed",
        "config",
        "versions",
        "compat",
    }
    assert values["compat"] == {"vision_features": True, "blind_rows": True, "causal_without_mask": True}
    assert {"crosstrim", "transformers", "torch", "device"} <= set(values["versions"])
    assert values["config"]["keep"] == 3
    assert "kept 6 of 85" in str(report)
    assert report.table().row_count == 2


def test_last_turn_needs_ids(model):
    batch = tiny.inputs(SINGLE)
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    with (
        torch.no_grad(),
        crosstrim.trim(model, k=0.1, rating_rows="last_turn"),
        pytest.raises(InputError, match="needs input_ids"),
    ):
        model(inputs_embeds=embeds, **batch)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_mask_that_is_too_short_is_refused_in_words_that_fit_a_plain_pass(model, rows):
    batch = tiny.inputs(SINGLE)
    batch["cross_attention_mask"] = batch["cross_attention_mask"][:, :rows]
    with (
        torch.no_grad(),
        crosstrim.trim(model, k=0.1),
        pytest.raises(
            InputError, match=rf"covers {rows} text rows, but this pass brings 13 and reaches row 13; give[^;]*$"
        ),
    ):
        model(**batch)
