"""What transformers promises of every model that generates, kept under a trim: in our own words, with open gates."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.logits_process import LogitsProcessor

import crosstrim
from crosstrim.models import compat
from crosstrim.models.names import cache_keyword
from tests.support import tiny
from tests.support.passes import OLD_TRANSFORMERS, compiled_config, grow
from tests.support.tiny import Image

needs_newer = pytest.mark.skipif(OLD_TRANSFORMERS, reason="its Mllama cannot do this untrimmed either")
TIERS = {"lossless": {}, "k=1": {"k": 1.0}, "keep=0.5": {"keep": 0.5}}
SAMPLES = [[2, Image(4), 9], [1, Image(4, seed=1), 4]]
PICTURES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
NEW_TOKENS = 4


@pytest.fixture(params=TIERS)
def trimmed(request, model):
    """The model with a trim on it; and what it generated untrimmed, where that must come out again."""
    model.generation_config.pad_token_id = tiny.PAD
    with crosstrim.trim(model, **TIERS[request.param]) as handle:
        model.drops_nothing = request.param != "keep=0.5"
        model.handle = handle
        yield model
        del model.handle


def run(model, batch, **options):
    options = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**batch, **options)


def check_same(one, other, atol=1e-4):
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), atol=atol, rtol=0)


def untrimmed(model, batch, **options):
    with model.handle.disabled():
        return run(model, batch, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": True, "top_k": 5, "top_p": 0.8, "temperature": 0.7},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 2, "bad_words_ids": [[5], [6, 7]]},
        {"min_new_tokens": NEW_TOKENS, "forced_eos_token_id": tiny.EOS},
    ],
    ids=str,
)
# A share of 1 chooses in the prompt, and decodes as the lossless tier does.
@pytest.mark.parametrize("trimmed", ["lossless", "keep=0.5"], indirect=True)
def test_every_way_to_decode_repeats_with_its_seed_and_needs_no_cache(trimmed, options):
    batch = tiny.inputs(*SAMPLES)

    def seeded(how, **more):
        torch.manual_seed(11)
        return how(trimmed, batch, **options, **more)

    first = seeded(run)
    check_same(seeded(run), first, atol=0)
    check_same(seeded(run, use_cache=False), first)
    if trimmed.drops_nothing:
        check_same(seeded(untrimmed), first)


def test_each_sample_of_a_batch_is_answered_as_if_it_were_alone(trimmed):
    together = run(trimmed, tiny.inputs(*SAMPLES))
    for place, sample in enumerate(SAMPLES):
        alone = run(trimmed, tiny.inputs(sample, seeds=[place]))
        assert torch.equal(alone.sequences[0, -NEW_TOKENS:], together.sequences[place, -NEW_TOKENS:])
        torch.testing.assert_close(
            torch.stack(alone.logits)[:, 0], torch.stack(together.logits)[:, place], atol=1e-4, rtol=0
        )


def test_padding_on_the_left_changes_nothing(trimmed):
    batch = tiny.inputs(SAMPLES[0])
    padded = {name: batch[name] for name in PICTURES}
    for name, gap in (("input_ids", tiny.PAD), ("attention_mask", 0)):
        padded[name] = torch.cat([torch.full((1, 7), gap), batch[name]], dim=1)
    hidden = torch.zeros_like(batch["cross_attention_mask"][:, :1]).expand(-1, 7, -1, -1)
    padded["cross_attention_mask"] = torch.cat([hidden, batch["cross_attention_mask"]], dim=1)
    expected, got = run(trimmed, batch), run(trimmed, padded)
    assert torch.equal(got.sequences[:, -NEW_TOKENS:], expected.sequences[:, -NEW_TOKENS:])
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_embeddings_serve_as_tokens_do(trimmed, use_cache):
    batch = tiny.inputs(*SAMPLES)
    expected = run(trimmed, batch, use_cache=use_cache)
    embeds = trimmed.get_input_embeddings()(batch["input_ids"])
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    got = run(trimmed, rest, inputs_embeds=embeds, use_cache=use_cache)
    assert torch.equal(got.sequences[:, -NEW_TOKENS:], expected.sequences[:, -NEW_TOKENS:])


def test_a_generation_goes_on_from_its_cache(trimmed):
    batch = tiny.inputs(SAMPLES[0])
    whole = run(trimmed, batch, max_new_tokens=6)
    half = run(trimmed, batch, max_new_tokens=3)
    longer = grow(batch, half.sequences[:, batch["input_ids"].shape[1] :])
    rest = run(trimmed, longer, max_new_tokens=3, **{cache_keyword(): half[cache_keyword()]})
    assert torch.equal(rest.sequences, whole.sequences)


def test_logits_of_the_prompt_may_be_computed_in_part(trimmed):
    batch = tiny.inputs(*SAMPLES)
    with torch.no_grad():
        everything = trimmed(**batch).logits
        for wanted in (1, 4, torch.tensor([0, 5, 7])):
            part = trimmed(**batch, logits_to_keep=wanted).logits
            expected = everything[:, -wanted:] if isinstance(wanted, int) else everything[:, wanted]
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=0)


@needs_newer
@pytest.mark.parametrize("kind", ["prompt lookup", "assistant", "assistant that samples"])
def test_assisted_decoding_matches_plain_decoding(trimmed, kind):
    batch = grow(tiny.inputs([2, Image(4), 3]), torch.tensor([[7, 8, 16, 16, 16, 16, 16, 9, 16, 16]]))
    batch |= {name: tiny.inputs([2, Image(4), 3])[name] for name in PICTURES}
    if kind == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 3}
    else:
        assistant = tiny.build()  # of the same weights
        compat.apply(assistant)
        options = {"assistant_model": assistant, "do_sample": "samples" in kind}
    got = run(trimmed, batch, max_new_tokens=10, **options)
    if not options.get("do_sample"):
        check_same(got, run(trimmed, batch, max_new_tokens=10))
    assert got.sequences.shape[1] == batch["input_ids"].shape[1] + 10


@needs_newer
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_static_cache_decodes_as_a_dynamic_one(trimmed, num_beams):
    batch = tiny.inputs(*SAMPLES)
    expected = run(trimmed, batch, num_beams=num_beams)
    check_same(run(trimmed, batch, num_beams=num_beams, cache_implementation="static"), expected)


@needs_newer
@pytest.mark.parametrize("tier", ["lossless", "keep=0.5"])
def test_a_static_cache_is_compiled_in_one_graph(shallow_model, tier):
    torch._dynamo.reset()
    batch = tiny.inputs(*SAMPLES)
    with crosstrim.trim(shallow_model, **TIERS[tier]):
        got = run(shallow_model, batch, cache_implementation="static", compile_config=compiled_config())
        check_same(got, run(shallow_model, batch))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_hidden_states_and_scores_are_handed_out_for_every_token(trimmed, options):
    batch = tiny.inputs(*SAMPLES)
    out = run(trimmed, batch, output_hidden_states=True, output_scores=True, **options)
    layers = trimmed.config.text_config.num_hidden_layers
    assert len(out.scores) == len(out.hidden_states) == NEW_TOKENS
    assert all(len(states) == layers + 1 for states in out.hidden_states)
    rows = [states[-1].shape[1] for states in out.hidden_states]
    assert rows == [batch["input_ids"].shape[1], *[1] * (NEW_TOKENS - 1)]


def test_attention_weights_are_handed_out_and_sum_to_one(trimmed):
    trimmed.set_attn_implementation("eager")
    batch = tiny.inputs(*SAMPLES)
    out = run(trimmed, batch, output_attentions=True)
    assert len(out.attentions) == NEW_TOKENS
    kept = {image.kept for row in trimmed.handle.report().samples for image in row}
    for step, layers in enumerate(out.attentions):
        assert len(layers) == trimmed.config.text_config.num_hidden_layers
        for index, weights in enumerate(layers):
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), atol=1e-5, rtol=0)
            if index in tiny.CROSS_LAYERS[1:] or (index in tiny.CROSS_LAYERS and step):
                assert weights.shape[-1] == max(kept)


def test_eager_matches_sdpa(trimmed):
    batch = tiny.inputs(*SAMPLES)
    expected = run(trimmed, batch)
    trimmed.set_attn_implementation("eager")
    check_same(run(trimmed, batch), expected)


def test_a_dictionary_and_a_tuple_say_the_same(trimmed):
    batch = tiny.inputs(*SAMPLES)
    with torch.no_grad():
        named, plain = trimmed(**batch), trimmed(**batch, return_dict=False)
    assert torch.equal(named.logits, plain[0])


def test_a_cache_can_be_offloaded_copied_and_reset(trimmed):
    batch = tiny.inputs(*SAMPLES)
    cache = DynamicCache(config=trimmed.config.text_config)
    with torch.no_grad():
        first = trimmed(**batch, **{cache_keyword(): cache}).logits
        copied = copy.deepcopy(cache)
        later = grow(batch, torch.tensor([[5], [6]]))
        step = {"input_ids": later["input_ids"][:, -1:], "attention_mask": later["attention_mask"]}
        step["cross_attention_mask"] = later["cross_attention_mask"]
        one = trimmed(**step, **{cache_keyword(): cache}).logits
        assert torch.equal(trimmed(**step, **{cache_keyword(): copied}).logits, one)
        fresh = DynamicCache(config=trimmed.config.text_config)
        assert torch.equal(trimmed(**batch, **{cache_keyword(): fresh}).logits, first)


class Ban(LogitsProcessor):
    """Forbids what was said last."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


def test_processors_of_ones_own_are_obeyed(trimmed):
    out = run(trimmed, tiny.inputs(*SAMPLES), logits_processor=[Ban()], max_new_tokens=8)
    new = out.sequences[:, -8:]
    assert (new[:, 1:] != new[:, :-1]).all()


def test_the_model_is_saved_as_if_it_were_not_trimmed(trimmed, tmp_path):
    batch = tiny.inputs(*SAMPLES)
    expected = untrimmed(trimmed, batch)
    trimmed.save_pretrained(tmp_path)
    handle = trimmed.handle
    handle.remove()
    again = type(trimmed).from_pretrained(tmp_path).eval()
    crosstrim.compat.apply(again)
    again.generation_config.eos_token_id = None
    again.generation_config.pad_token_id = tiny.PAD
    check_same(run(again, batch), expected)
