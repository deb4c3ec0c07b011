"""A model as transformers loads it: what rows see that are to see nothing must not depend on the trim."""

from __future__ import annotations

import warnings

import pytest
import torch

import crosstrim
from crosstrim.errors import CompatWarning
from tests.support import tiny
from tests.support.tiny import Image

TEXT = [11]
MATES = [[2, Image(4), 9], [1, Image(1, seed=1), 4], [3, Image(3, seed=2), 7]]
LOSSY = [
    {"k": 0.1},
    {"keep": 9},
    {"keep": 9, "trim_first_layer": False},
    {"k": 0.1, "policy": "pyramid"},
    {"policy": "mass:0.3"},
]


@pytest.fixture(autouse=True)
def _unrepaired_is_known():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatWarning)
        yield


def logits_of_text(model, mates, use_cache):
    """Of a text in a batch of pictures, the prompt's and two steps', when another sample speaks."""
    batch = tiny.inputs(TEXT, *mates, seeds=[0, *range(5, 5 + len(mates))])
    out = model.generate(
        **batch, max_new_tokens=3, use_cache=use_cache, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits, 1)[0]


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("options", [{}, {"k": 1.0}, *LOSSY], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # without a mask where it can be, and always with one
def test_a_text_does_not_depend_on_the_pictures_it_is_batched_with(
    model, raw_model, repaired, options, use_cache, attention
):
    model = model if repaired else raw_model
    model.set_attn_implementation(attention)
    with crosstrim.trim(model, **options):
        expected = logits_of_text(model, MATES[:1], use_cache)
        for mates in ([MATES[2]], MATES):
            # Padding to the longest prompt is the same: every mate is shorter than the text's row.
            torch.testing.assert_close(logits_of_text(model, mates, use_cache), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", LOSSY, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_picture_does_not_depend_on_the_text_it_is_batched_with(raw_model, options, attention):
    raw_model.set_attn_implementation(attention)

    def logits(*samples):
        batch = tiny.inputs(*samples, seeds=list(range(3, 3 + len(samples))))
        with torch.no_grad(), crosstrim.trim(raw_model, **options):
            return raw_model(**batch).logits[0]

    alone = logits(MATES[0])
    torch.testing.assert_close(logits(MATES[0], TEXT), alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(MATES[0], MATES[1]), alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"k": 1.0}, {"keep": 1.0}], ids=str)
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_drops_nothing_visible_changes_no_answer(raw_model, options, mask, use_cache):
    batch = tiny.inputs([2, Image(1), 9], TEXT, [2, Image(2, seed=4), 5])
    if not mask:
        del batch["cross_attention_mask"]
    wanted = {"max_new_tokens": 4, "use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True}
    expected = raw_model.generate(**batch, **wanted)
    with crosstrim.trim(raw_model, **options):
        got = raw_model.generate(**batch, **wanted)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("options", [{"k": 1.0}, {"keep": 1.0}, {"k": 1.0, "policy": "mmr"}], ids=str)
@pytest.mark.parametrize("visible_to_padding", [[3], []], ids=["a tile of its own", "nothing"])
def test_everything_is_lossless_under_right_padding_with_a_mask_of_ones_own(
    model, raw_model, repaired, options, visible_to_padding
):
    model = model if repaired else raw_model
    batch = tiny.inputs([2, Image(4), 9], [1, Image(4, seed=1), 4], pad="right")
    batch["cross_attention_mask"][:, :, :, 2:] = 0
    batch["cross_attention_mask"][1, -3:] = 0
    batch["cross_attention_mask"][1, -3:, :, visible_to_padding] = 1
    wanted = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    with crosstrim.trim(model) as trimmed:
        expected, samples = model.generate(**batch, **wanted), trimmed.report().samples
    with crosstrim.trim(model, **options) as trimmed:
        got = model.generate(**batch, **wanted)
        assert trimmed.report().samples == samples
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)
