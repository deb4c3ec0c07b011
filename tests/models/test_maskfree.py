"""Which attention runs without a mask, and that it gives what the oracle gives: each path forced on and watched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import crosstrim
from crosstrim.models import compat, interface
from tests.support import oracle, tiny
from tests.support.tiny import Image

SINGLE = [[2, Image(4), 9]]
RAGGED = [[2, Image(4), 9], [1, Image(1, seed=1), 4]]
PREFILL, DECODE = 3, 3  # cross-attention layers


@pytest.fixture
def calls(monkeypatch):
    """The counts and text rows of every attention that ran without a mask."""
    seen = []

    def attend(queries, keys, values, counts, *others):
        seen.append((counts, queries.shape[2]))
        return real(queries, keys, values, counts, *others)

    real = interface.attend
    monkeypatch.setattr(interface, "attend", attend)
    return seen


def generate(model, batch, new_tokens=3, **options):
    out = model.generate(
        **batch, max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def check_against_oracle(model, batch, tokens, logits, atol=1e-4, **knobs):
    kept = oracle.kept_features(model, batch, **knobs)
    start = batch["input_ids"].shape[1] - 1
    expected = oracle.masked_logits(model, batch, kept, tokens[:, :-1])[:, start:]
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)
    return tuple(kept.sum(-1).tolist())


def test_one_picture_needs_no_mask_at_prefill_or_decode(model, calls):
    batch = tiny.inputs(*SINGLE)
    with crosstrim.trim(model, k=0.1):
        tokens, logits = generate(model, batch)
    kept = check_against_oracle(model, batch, tokens, logits, k=0.1)
    rows = batch["input_ids"].shape[1]
    assert calls == [((68,), rows), *[(kept, rows)] * 2, *[(kept, 1)] * 2 * DECODE]


def test_equal_budgets_need_no_mask_in_a_batch(model, calls):
    batch = tiny.inputs(*RAGGED)
    with crosstrim.trim(model, keep=7, policy="union"):
        tokens, logits = generate(model, batch)
    assert check_against_oracle(model, batch, tokens, logits, keep=7) == (7, 7)
    # At prefill the leader must not see the padding tiles of the second sample.
    rows = batch["input_ids"].shape[1]
    assert calls == [*[((7, 7), rows)] * 2, *[((7, 7), 1)] * 2 * DECODE]


def test_samples_that_keep_different_numbers_read_their_own(model, calls):
    batch = tiny.inputs(*RAGGED)
    with crosstrim.trim(model, k=0.1):
        tokens, logits = generate(model, batch)
    kept = check_against_oracle(model, batch, tokens, logits, k=0.1)
    assert kept[0] != kept[1]
    rows = batch["input_ids"].shape[1]
    assert calls == [*[(kept, rows)] * 2, *[(kept, 1)] * 2 * DECODE]


@pytest.mark.parametrize(
    ("sample", "sees_both"),
    [([1, Image(4), 5, Image(2, seed=1), 7], False), ([2, Image(2), Image(3, seed=1), 8], True)],
    ids=["apart", "adjacent"],
)
def test_rows_that_see_different_pictures_keep_their_mask(model, calls, sample, sees_both):
    batch = tiny.inputs(sample)
    with crosstrim.trim(model, k=0.1):
        tokens, logits = generate(model, batch)
    check_against_oracle(model, batch, tokens, logits, k=0.1)
    # The prompt has rows between the pictures, or the first picture's own row at least, that see one alone.
    assert [rows for _, rows in calls] == ([1] * 2 * DECODE if sees_both else [])


def test_a_later_mask_that_hides_a_tile_is_obeyed(model, calls):
    batch = tiny.inputs(*SINGLE)
    kept = oracle.kept_features(model, batch, k=0.1)
    token = batch["input_ids"][:, -1:]
    mask = batch["cross_attention_mask"][:, -1:].clone()
    mask[..., 1] = 0
    grown = {name: torch.cat([batch[name], new], 1) for name, new in (("input_ids", token),)} | {
        name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    }
    grown["attention_mask"] = torch.ones_like(grown["input_ids"])
    grown["cross_attention_mask"] = torch.cat([batch["cross_attention_mask"], mask], 1)
    with torch.no_grad(), crosstrim.trim(model, k=0.1):
        cache = DynamicCache(config=model.config.text_config)
        model(**batch, past_key_values=cache)
        calls.clear()
        mask = grown["cross_attention_mask"]
        logits = model(input_ids=token, cross_attention_mask=mask, past_key_values=cache).logits
        assert calls == []
    expected = oracle.masked_logits(model, grown, kept, token[:, :0])
    hidden_tile = kept.clone()
    hidden_tile[:, 17:34] = False
    assert hidden_tile.sum() < kept.sum()
    unlike = expected[:, -1]  # the leader's row of the last token sees all in this oracle; hide there as well
    layer = model.model.language_model.layers[tiny.CROSS_LAYERS[0]]

    def hide(module, args, kwargs):
        late = kwargs["cross_attention_mask"].clone()
        late[:, :, -1] = late[:, :, -1].masked_fill(~hidden_tile[:, None], -torch.inf)
        return args, kwargs | {"cross_attention_mask": late}

    hook = layer.register_forward_pre_hook(hide, with_kwargs=True)
    expected = oracle.masked_logits(model, grown, kept, token[:, :0])
    hook.remove()
    torch.testing.assert_close(logits[:, 0], expected[:, -1], atol=1e-4, rtol=0)
    assert (unlike - expected[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("samples", [SINGLE, RAGGED], ids=["rectangular", "ragged"])
def test_eager_attention_stays_eager_and_shows_its_weights(calls, samples):
    model = tiny.build(attention="eager")
    compat.apply(model)
    batch = tiny.inputs(*samples)
    with crosstrim.trim(model, k=0.1):
        tokens, logits = generate(model, batch)
        with torch.no_grad():
            weights = model(**batch, output_attentions=True).attentions
    kept = check_against_oracle(model, batch, tokens, logits, k=0.1)
    assert calls == []
    assert [one.shape[-1] for one in weights if one.shape[-1] != batch["input_ids"].shape[1]] == [
        68,
        *[max(kept)] * 2,
    ]


@pytest.mark.parametrize("samples", [SINGLE, RAGGED], ids=["rectangular", "ragged"])
def test_bfloat16(model, calls, samples):
    low = tiny.build(dtype=torch.bfloat16)
    compat.apply(low)
    batch = tiny.inputs(*samples)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with crosstrim.trim(low, keep=7) as trimmed:
        tokens, logits = generate(low, batch)
        kept = torch.zeros(len(samples), 68, dtype=torch.bool)
        for sample, row in enumerate(trimmed.report().samples):
            kept[sample, list(row[0].kept_indices)] = True
    expected = oracle.masked_logits(low, batch, kept, tokens[:, :-1])[:, batch["input_ids"].shape[1] - 1 :]
    assert len(calls) >= 2 + 2 * DECODE
    assert (logits.float() - expected.float()).abs().max() < 0.1 * expected.float().std()


@pytest.mark.parametrize("options", [{}, {"k": 1.0}], ids=["lossless", "everything"])
def test_rows_before_the_image_that_were_not_repaired(raw_model, calls, options):
    batch = tiny.inputs(*SINGLE)
    expected_tokens, expected = generate(raw_model, batch)
    with pytest.warns(crosstrim.errors.CompatWarning), crosstrim.trim(raw_model, **options):
        tokens, logits = generate(raw_model, batch)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert len(calls) == PREFILL + 2 * DECODE


def test_padding_that_only_later_layers_drop_on_an_unrepaired_model(raw_model, calls):
    batch = tiny.inputs([2, Image(1), 9])
    _, expected = generate(raw_model, batch)
    with pytest.warns(crosstrim.errors.CompatWarning), crosstrim.trim(raw_model):
        _, logits = generate(raw_model, batch)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert calls == [((17,), 1)] * 2 * DECODE


@pytest.mark.parametrize("repaired", [True, False])
def test_without_any_cross_attention_mask_the_model_does_what_it_does_untrimmed(calls, repaired):
    model = tiny.build()
    if repaired:
        compat.apply(model)
    batch = tiny.inputs(*SINGLE)
    del batch["cross_attention_mask"]
    with torch.no_grad():
        expected = model(**batch).logits
        with pytest.warns() if not repaired else torch.no_grad(), crosstrim.trim(model):
            logits = model(**batch).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert len(calls) == (PREFILL if repaired else 0)


def test_disabled_and_removed_are_the_stock_model_to_the_bit(model, calls):
    batch = tiny.inputs(*RAGGED)
    expected_tokens, expected = generate(model, batch)
    handle = crosstrim.trim(model, keep=7)
    with handle.disabled():
        tokens, logits = generate(model, batch)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected)
    generate(model, batch)
    assert len(calls) > 0
    handle.remove()
    calls.clear()
    assert torch.equal(generate(model, batch)[1], expected)
    assert calls == []


def test_without_a_cache(model, calls):
    batch = tiny.inputs(*SINGLE)
    with crosstrim.trim(model, keep=7, policy="union"):
        tokens, logits = generate(model, batch, use_cache=False)
    check_against_oracle(model, batch, tokens, logits, keep=7)
    rows = batch["input_ids"].shape[1]
    # The leader's later rows see less than the prompt's, so only its first pass is without a mask.
    assert [call for call in calls if call[0] == (68,)] == [((68,), rows)]
    assert [call for call in calls if call[0] == (7,)] == [((7,), rows + step) for step in range(3) for _ in range(2)]


def test_an_adapter_put_around_a_projection_after_trimming_gets_what_the_model_would_give_it(model, calls):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, hidden_states):
            return self.base(hidden_states) + 0.5 * hidden_states

    batch = tiny.inputs(*SINGLE)
    attention = model.model.language_model.layers[tiny.CROSS_LAYERS[1]].cross_attn
    with crosstrim.trim(model, k=0.1):
        attention.o_proj = Adapter(attention.o_proj)
        tokens, logits = generate(model, batch)
    check_against_oracle(model, batch, tokens, logits, k=0.1)
    assert len(calls) == 3 * (1 + 2)  # the adapter's layer like the others


def test_a_beam_follows_its_own_count(model, calls):
    batch = tiny.inputs(*RAGGED)
    with crosstrim.trim(model, k=0.1) as trimmed:
        generate(model, batch, num_beams=3)
        kept = [sum(image.kept for image in row) for row in trimmed.report().samples]
    assert kept[0] != kept[-1]
    wide = tuple(kept) if len(kept) == 6 else tuple(count for count in kept for _ in range(3))
    assert {counts for counts, rows in calls if rows == 1} == {wide}
