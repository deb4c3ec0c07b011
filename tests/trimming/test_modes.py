"""Every way transformers can decode, checked by value against the masked untrimmed model."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import crosstrim
from crosstrim.errors import CrosstrimWarning, InputError, UnsupportedCacheError
from crosstrim.models import compat
from tests.support import oracle, tiny
from tests.support.passes import OLD_TRANSFORMERS, RAGGED, SINGLE, grow, hidden_from, split_turns
from tests.support.tiny import Image

NEW_TOKENS = 6


def new_tokens(sequences, batch):
    return sequences[:, batch["input_ids"].shape[1] :]


def expected_logits(model, batch, tokens, kept):
    """What the oracle says the logits behind each of the generated `tokens` are."""
    start = batch["input_ids"].shape[1] - 1
    return oracle.masked_logits(model, batch, kept, tokens[:, :-1])[:, start:]


def repeated(batch, times):
    return {name: tensor.repeat_interleave(times, dim=0) for name, tensor in batch.items()}


def run(model, batch, **options):
    options = {"max_new_tokens": NEW_TOKENS, "output_logits": True, **options}
    return model.generate(**batch, return_dict_in_generate=True, **options)


def test_sampling_draws_from_the_oracles_distribution_and_repeats_with_its_seed(model):
    batch = tiny.inputs(*RAGGED)
    kept = oracle.kept_features(model, batch, k=0.1)
    with crosstrim.trim(model, k=0.1):
        torch.manual_seed(7)
        first = run(model, batch, do_sample=True, temperature=1.5)
        torch.manual_seed(7)
        second = run(model, batch, do_sample=True, temperature=1.5)
    tokens = new_tokens(first.sequences, batch)
    assert torch.equal(first.sequences, second.sequences)
    torch.testing.assert_close(
        torch.stack(first.logits, 1), expected_logits(model, batch, tokens, kept), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_score_as_the_oracle_scores_their_sequences(model, use_cache):
    batch, beams = tiny.inputs(*RAGGED), 3
    kept = oracle.kept_features(model, batch, k=0.1)
    with crosstrim.trim(model, k=0.1):
        out = run(
            model,
            batch,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=0.0,
            output_scores=True,
            use_cache=use_cache,
        )
    wide = repeated(batch, beams)
    tokens = new_tokens(out.sequences, batch)
    logits = expected_logits(model, wide, tokens, kept.repeat_interleave(beams, 0))
    scores = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, scores, atol=1e-4, rtol=0)
    assert len({tuple(row) for row in tokens.tolist()}) == len(RAGGED) * beams


def test_num_return_sequences(model):
    batch = tiny.inputs(*RAGGED)
    kept = oracle.kept_features(model, batch, keep=0.2).repeat_interleave(2, 0)
    with crosstrim.trim(model, keep=0.2, policy="union") as trimmed:
        torch.manual_seed(3)
        out = run(model, batch, do_sample=True, num_return_sequences=2)
        assert len(trimmed.report().samples) == 4
    tokens = new_tokens(out.sequences, batch)
    expected = expected_logits(model, repeated(batch, 2), tokens, kept)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=0)


def test_text_only_prompts_are_untouched(model):
    batch = tiny.inputs([6], [9])
    expected = run(model, batch)
    with crosstrim.trim(model, k=0.1) as trimmed:
        out = run(model, batch)
        assert trimmed.report().to_dict()["samples"] == []
        assert trimmed.report().kv_bytes == 0
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


@pytest.mark.parametrize(
    "options", [{"k": 0.1}, {"k": 0.1, "trim_first_layer": False}, {"k": 0.1, "merge": True}], ids=str
)
@pytest.mark.parametrize("samples", [[SINGLE], RAGGED], ids=["single", "ragged"])
def test_without_a_cache_the_same_tokens_come_out(model, samples, options):
    batch = tiny.inputs(*samples)
    with crosstrim.trim(model, **options) as trimmed:
        cached = run(model, batch)
        with_cache = trimmed.report()
        uncached = run(model, batch, use_cache=False)
        assert trimmed.report().samples == with_cache.samples
        assert trimmed.report().kv_bytes == 0
    assert torch.equal(uncached.sequences, cached.sequences)
    torch.testing.assert_close(torch.stack(uncached.logits), torch.stack(cached.logits), atol=1e-4, rtol=0)


def test_without_a_cache_another_question_about_the_same_tensor_is_selected_anew(model):
    batch = tiny.inputs(SINGLE)
    other = tiny.inputs(SINGLE, seeds=[9]) | {"pixel_values": batch["pixel_values"]}
    with torch.no_grad(), crosstrim.trim(model, k=0.1) as trimmed:
        model(**batch, use_cache=False)
        first = trimmed.report().samples
        model(**other, use_cache=False)
        second = trimmed.report().samples
        model(**other)
        assert second == trimmed.report().samples != first


def test_a_conversation_goes_on_with_its_first_selection(model):
    batch = tiny.inputs(*RAGGED)
    kept = oracle.kept_features(model, batch, k=0.1)
    more = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    with crosstrim.trim(model, k=0.1) as trimmed:
        first = run(model, batch)
        turn = grow(grow(batch, new_tokens(first.sequences, batch)), more)
        second = run(model, turn, past_key_values=first.past_key_values)
        assert trimmed.report(second.past_key_values).samples == trimmed.report().samples
    after = new_tokens(second.sequences, batch)
    expected = expected_logits(model, batch, after, kept)[:, -NEW_TOKENS:]
    torch.testing.assert_close(torch.stack(second.logits, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("trim_first_layer", [True, False])
def test_an_appended_image_is_scored_by_the_rows_after_it_and_joins_the_kept(model, trim_first_layer):
    length = 14
    # Adjacent images would not tell whether the old one stays visible, so the mask lets later rows see both.
    two = tiny.inputs([2, Image(4), length - 4, Image(2, seed=1), 6])
    two["cross_attention_mask"][:, length:, 0] = 1
    first, second = split_turns(two, length)
    kept_old = oracle.kept_features(model, first, k=0.1)
    with torch.no_grad(), crosstrim.trim(model, k=0.1, trim_first_layer=trim_first_layer) as trimmed:
        cache = DynamicCache(config=model.config.text_config)
        model(**first, past_key_values=cache)
        logits = model(**second, past_key_values=cache).logits
        report = trimmed.report(cache)
    size = tiny.FEATURES_PER_IMAGE
    chosen = [image.kept_indices for image in report.samples[0]]
    assert list(chosen[0]) == kept_old[0].nonzero().squeeze(-1).tolist()

    # The oracle: one pass over everything; what was dropped of the first image is hidden from later rows.
    dropped_old = torch.cat([~kept_old, torch.zeros_like(kept_old)], dim=1)
    hide_from_leader = dropped_old if trim_first_layer else torch.zeros_like(dropped_old)
    weights = masked_leader_attention(model, two, length, hide_from_leader)
    saliency = weights[:, :, length:, size:].sum(2)
    kept_new = oracle.kept_by_loops(saliency, oracle.feature_visibility(two).any(1)[:, size:], k=0.1)
    assert [index - size for index in chosen[1]] == kept_new[0].nonzero().squeeze(-1).tolist()
    dropped = torch.cat([~kept_old, ~kept_new], dim=1)
    expected = logits_with_masks(model, two, length, hide_from_leader, dropped)[:, length:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def masked_leader_attention(model, batch, start, dropped):
    with hidden_from(model, tiny.CROSS_LAYERS[:1], start, dropped):
        return oracle.leader_attention(model, batch)


def logits_with_masks(model, batch, start, dropped_in_leader, dropped):
    with (
        torch.no_grad(),
        hidden_from(model, tiny.CROSS_LAYERS[:1], start, dropped_in_leader),
        hidden_from(model, tiny.CROSS_LAYERS[1:], 0, dropped),
    ):
        return model(**batch, use_cache=False).logits


# Prompts that repeat themselves, so that lookup finds candidates: refused ones, and some that come true.
REFUSED, ACCEPTED = [7, 8, 9, 7, 8, 9, 16, 16, 7, 8], [7, 8, 16, 16, 16, 16, 16, 9, 16, 16]


@pytest.mark.parametrize("ending", [REFUSED, ACCEPTED], ids=["refused", "accepted"])
@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("merge", [False, True])
def test_assisted_decoding_gives_the_greedy_tokens_and_never_crops_images(model, kind, ending, merge):
    batch = tiny.inputs([2, Image(4), 3])
    images = {name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    batch = grow(batch, torch.tensor([ending])) | images
    assistant = copy.deepcopy(model)
    options = {"prompt_lookup_num_tokens": 4} if kind == "prompt lookup" else {"assistant_model": assistant}
    passes = []
    with crosstrim.trim(model, k=0.1, merge=merge) as trimmed:
        greedy = run(model, batch, max_new_tokens=16)
        model.model.register_forward_pre_hook(lambda module, args: passes.append(1))
        if OLD_TRANSFORMERS:
            # Its Mllama cannot do this untrimmed either; the assistant already fails before it reaches us.
            with pytest.raises(InputError if kind == "prompt lookup" else TypeError) as refusal:
                run(model, batch, max_new_tokens=16, **options)
            assert kind == "assistant" or transformers.__version__ in str(refusal.value)
            return
        assisted = run(model, batch, max_new_tokens=16, **options)
        kept = trimmed.report(assisted.past_key_values).kept
    assert torch.equal(assisted.sequences, greedy.sequences)
    torch.testing.assert_close(torch.cat(assisted.logits), torch.cat(greedy.logits), atol=1e-4, rtol=0)
    assert ending == REFUSED or len(passes) < 16
    for index in tiny.CROSS_LAYERS:
        assert assisted.past_key_values.layers[index].keys.shape[2] == kept


def test_a_packed_cache_is_refused_by_name_and_nothing_is_cached(model):
    class PackedLayer(DynamicLayer):
        pass

    batch = tiny.inputs(SINGLE)
    with crosstrim.trim(model, k=0.1):
        cache = DynamicCache(config=model.config.text_config)
        cache.layers[tiny.CROSS_LAYERS[1]] = PackedLayer()
        with pytest.raises(UnsupportedCacheError, match=r"PackedLayer.*DynamicCache"):
            run(model, batch, past_key_values=cache)
        assert not any(layer.is_initialized for layer in cache.layers)
        again = run(model, batch)
        assert again.sequences.shape[1] == batch["input_ids"].shape[1] + NEW_TOKENS


def test_offloaded_cache(model, monkeypatch):
    """On a machine without an accelerator the streams are stood in for; the order of offloading is the real one."""

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    batch = tiny.inputs(*RAGGED)
    with crosstrim.trim(model, k=0.1):
        plain = run(model, batch)
        if not torch.cuda.is_available():
            monkeypatch.setattr(torch, "Stream", Stream)
            monkeypatch.setattr(torch.cuda, "Stream", Stream)
            monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
            monkeypatch.setattr(torch.cuda, "default_stream", lambda *device: Stream())
            monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: Stream())
        offloaded = run(model, batch, past_key_values=DynamicCache(config=model.config.text_config, offloading=True))
    assert torch.equal(offloaded.sequences, plain.sequences)
    assert torch.equal(torch.stack(offloaded.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dtypes_and_attention_implementations(dtype, attention):
    model = tiny.build(dtype=dtype, attention=attention)
    compat.apply(model)
    batch = tiny.inputs(*RAGGED)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    seen: dict[str, torch.Tensor] = {}

    def see(name):
        def hook(module, args, output):
            seen.setdefault(name, output.clone())

        return hook

    leader = model.model.language_model.layers[tiny.CROSS_LAYERS[0]].cross_attn
    hooks = [
        leader.q_norm.register_forward_hook(see("q")),
        leader.k_norm.register_forward_hook(see("k")),
    ]
    with crosstrim.trim(model, k=0.1) as trimmed:
        out = run(model, batch)
    for hook in hooks:
        hook.remove()
    visible = oracle.feature_visibility(batch)
    saliency = oracle.saliency_by_loops(seen["q"], seen["k"], visible, batch["attention_mask"].bool(), leader.scaling)
    kept = oracle.kept_by_loops(saliency, visible.any(1), k=0.1, size=tiny.FEATURES_PER_IMAGE)
    for sample, row in enumerate(trimmed.report().samples):
        assert list(row[0].kept_indices) == kept[sample].nonzero().squeeze(-1).tolist()
    tokens = new_tokens(out.sequences, batch)
    expected = expected_logits(model, batch, tokens, kept)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(torch.stack(out.logits, 1), expected.float(), atol=tolerance, rtol=0)


def test_inputs_embeds(model):
    batch = tiny.inputs(*RAGGED)
    with crosstrim.trim(model, k=0.1) as trimmed:
        by_ids = run(model, batch)
        samples = trimmed.report().samples
        embeds = model.get_input_embeddings()(batch["input_ids"])
        rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
        by_embeds = run(model, rest, inputs_embeds=embeds)
        assert trimmed.report().samples == samples
    assert torch.equal(by_embeds.sequences[:, -NEW_TOKENS:], by_ids.sequences[:, -NEW_TOKENS:])


@pytest.mark.parametrize("merge", [False, True])
def test_a_copied_cache_keeps_its_selection(model, merge):
    batch = tiny.inputs(*RAGGED)
    more = torch.tensor([[7, 8, 9], [10, 11, 12]])
    with torch.no_grad(), crosstrim.trim(model, k=0.1, merge=merge) as trimmed:
        cache = model(**batch, past_key_values=DynamicCache(config=model.config.text_config)).past_key_values
        branch = copy.deepcopy(cache)
        first = run(model, grow(batch, more), past_key_values=cache)
        second = run(model, grow(batch, more), past_key_values=branch)
        assert trimmed.report(branch).samples == trimmed.report(cache).samples
    assert torch.equal(first.sequences, second.sequences)


@pytest.mark.parametrize("merge", [False, True])
def test_a_cache_repeated_reordered_or_selected_takes_its_selection_along(model, merge):
    batch = tiny.inputs(*RAGGED)
    order = torch.tensor([1, 0, 1])
    picked = {name: tensor[order] for name, tensor in batch.items()}
    more = torch.tensor([[7, 8, 9]]).expand(3, -1)
    with torch.no_grad(), crosstrim.trim(model, k=0.1, merge=merge):
        direct = model(**picked, past_key_values=DynamicCache(config=model.config.text_config)).past_key_values
        expected = run(model, grow(picked, more), past_key_values=direct)
        cache = model(**batch, past_key_values=DynamicCache(config=model.config.text_config)).past_key_values
        with pytest.raises(InputError, match="holds 2 samples and the input 3"):
            run(model, grow(picked, more), past_key_values=copy.deepcopy(cache))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
        out = run(model, grow(picked, more), past_key_values=cache)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


def test_a_mask_without_an_image_is_text_and_said_to_be(model):
    batch = tiny.inputs(SINGLE)
    textual = {name: batch[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    with torch.no_grad():
        expected = model(**textual).logits
        with crosstrim.trim(model, k=0.1), pytest.warns(CrosstrimWarning, match="will not depend on the image"):
            assert torch.equal(model(**textual).logits, expected)


@pytest.mark.parametrize("user_turn", [None, (7, 8)])
def test_only_the_last_turn_rates_when_asked(model, user_turn):
    batch = tiny.inputs([2, Image(4), 9], [1, Image(2, seed=1), 12])
    batch["input_ids"][:, -5:-3] = torch.tensor([7, 8])
    ids = batch["input_ids"].tolist()
    rating = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for sample, row in enumerate(ids):
        start = len(row) - 3 if user_turn else len(row) - row[::-1].index(tiny.IMAGE_TOKEN)
        rating[sample, start:] = True
    kept = oracle.kept_features(model, batch, rating=rating, k=0.1)
    assert not torch.equal(kept, oracle.kept_features(model, batch, k=0.1))
    with torch.no_grad(), crosstrim.trim(model, k=0.1, rating_rows="last_turn", user_turn_ids=user_turn) as trimmed:
        model(**batch)
    for sample, row in enumerate(trimmed.report().samples):
        assert list(row[0].kept_indices) == kept[sample].nonzero().squeeze(-1).tolist()
