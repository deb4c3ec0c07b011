"""Generations without a cache: the prompt decides once, for as long as nothing that decides has changed."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

import crosstrim
from crosstrim.asking import answering
from crosstrim.errors import CompatWarning
from crosstrim.models import compat
from tests.support import tiny
from tests.support.passes import grow
from tests.support.questions import PICTURE, QUESTIONS
from tests.support.tiny import Image

SINGLE = [2, Image(4), 9]
PICTURES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class Adapter(nn.Module):
    """A projection with something added to it, that can be switched and scaled."""

    def __init__(self, base):
        super().__init__()
        self.base, self.enabled, self.scale = base, False, 1.0
        generator = torch.Generator().manual_seed(5)
        self.change = nn.Parameter(torch.randn(base.weight.shape, generator=generator) * 0.2)

    def forward(self, numbers):
        added = nn.functional.linear(numbers, self.change) * self.scale
        return self.base(numbers) + (added if self.enabled else 0)


def leader(model):
    return model.model.language_model.layers[tiny.CROSS_LAYERS[0]].cross_attn


def pixels(model, batch):
    with torch.inference_mode():
        batch["pixel_values"].copy_(tiny.inputs([2, Image(4, seed=5), 9])["pixel_values"])


def weights(model, batch):
    with torch.inference_mode():
        leader(model).q_proj.weight.neg_()


def tower(model, batch):
    with torch.inference_mode():
        projector = model.model.multi_modal_projector.weight
        projector.copy_(projector.flip(0))


def values(model, batch):
    with torch.inference_mode():
        projection = leader(model).v_proj.base.weight
        projection.copy_(projection.flip(0).roll(3, 0))


def earlier_layer(model, batch):
    with torch.inference_mode():
        model.model.language_model.layers[0].mlp.down_proj.weight.neg_()


def switch(model, batch):
    leader(model).k_proj.enabled = True


def scale(model, batch):
    leader(model).v_proj.scale = -3.0


def mask(model, batch):
    batch["cross_attention_mask"][..., 2:] = 0


@pytest.mark.parametrize("change", [pixels, weights, tower, values, earlier_layer, switch, scale, mask])
@pytest.mark.parametrize("longer", [0, 1, 3])
def test_whatever_changed_between_two_passes_is_chosen_on_anew(model, change, longer):
    model, batch = copy.deepcopy(model), tiny.inputs(SINGLE)
    attention = leader(model)
    attention.k_proj, attention.v_proj = Adapter(attention.k_proj), Adapter(attention.v_proj)
    attention.v_proj.enabled = True
    after = batch if not longer else grow(batch, torch.tensor([[7, 8, 9][:longer]]))
    with torch.no_grad():
        with crosstrim.trim(model, keep=6) as trimmed:
            stale = model(**batch, use_cache=False).logits
            before = trimmed.report().samples
            change(model, batch)
            if longer:
                after = grow(batch, torch.tensor([[7, 8, 9][:longer]])) | {name: batch[name] for name in PICTURES}
            got = model(**after, use_cache=False).logits
            samples = trimmed.report().samples
        with crosstrim.trim(model, keep=6) as trimmed:
            fresh = {name: tensor.clone() for name, tensor in after.items()}
            assert torch.equal(got, model(**fresh, use_cache=False).logits)
            assert samples == trimmed.report().samples
    assert samples != before or longer
    assert not torch.equal(stale, got[:, : stale.shape[1]])


def test_autocast_is_noticed(model):
    batch = tiny.inputs(SINGLE)
    with torch.no_grad(), crosstrim.trim(model, keep=6) as trimmed:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**{name: tensor.clone() for name, tensor in batch.items()}, use_cache=False)
            expected = trimmed.report().samples
        model(**batch, use_cache=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch, use_cache=False)
        assert trimmed.report().samples == expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_changed_and_the_first_choice_stays(model, mode):
    batch = tiny.inputs(SINGLE)
    longer = grow(batch, torch.tensor([[7, 8, 9]])) | {name: batch[name] for name in PICTURES}
    with mode(), crosstrim.trim(model, keep=6) as trimmed:
        model(**batch, use_cache=False)
        first = trimmed.report().samples
        model(**longer, use_cache=False)
        assert trimmed.report().samples == first
    with mode(), crosstrim.trim(model, keep=6) as trimmed:
        model(**longer, use_cache=False)
        assert trimmed.report().samples != first  # else the rows after the prompt decide nothing here


def two_questions():
    first = tiny.inputs(SINGLE)
    other = tiny.inputs([4, Image(4), 13], seeds=[9]) | {name: first[name] for name in PICTURES}
    return [first, other]


def answers(model, batch, steps):
    """Token by token, without a cache."""
    for _ in range(steps):
        token = model(**batch, use_cache=False).logits[:, -1:].argmax(-1)
        batch = grow(batch, token) | {name: batch[name] for name in PICTURES}
        yield int(token)


def test_two_questions_about_one_picture_in_turn(model):
    with torch.no_grad(), crosstrim.trim(model, keep=6):
        alone = []
        for batch in two_questions():
            own = {name: tensor.clone() for name, tensor in batch.items()}
            alone.append(list(answers(model, own, 8)))
        together = [answers(model, batch, 8) for batch in two_questions()]
        taken = list(zip(*together, strict=True))
    assert [list(one) for one in zip(*taken, strict=True)] == alone


def test_two_questions_about_one_picture_in_two_threads(model):
    questions = two_questions()
    with crosstrim.trim(model, keep=6):

        def generate(batch):
            with torch.no_grad():
                return list(answers(model, batch, 6))

        alone = [generate({name: tensor.clone() for name, tensor in batch.items()}) for batch in questions]
        found, barrier = [[], []], threading.Barrier(2)

        def work(place):
            barrier.wait()
            found[place] += [generate(questions[place]) for _ in range(5)]

        threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[alone[0]] * 5, [alone[1]] * 5]


def test_many_questions_about_one_picture_hold_few_of_them(model):
    picture = tiny.inputs(SINGLE)
    with torch.no_grad(), crosstrim.trim(model, keep=6) as trimmed:
        for seed in range(40):
            model(**tiny.inputs(SINGLE, seeds=[seed]) | {name: picture[name] for name in PICTURES}, use_cache=False)
        held = trimmed._trim.uncached._prompts[picture["pixel_values"]]
    assert len(held) == 16


@pytest.mark.parametrize("options", [{"k": 0.1}, {"keep": 5}, {"keep": 5, "merge": True}, {}], ids=str)
def test_a_session_answers_as_generate_does_whatever_the_model_makes_of_caches(checkpoint, options):
    model, processor = crosstrim.load(checkpoint)
    expected = answering.ask(
        model, processor, PICTURE, QUESTIONS[0], crosstrim.TrimConfig(**options), max_new_tokens=6
    )
    model.generation_config.use_cache = False
    got = crosstrim.Session(model, processor, PICTURE, **options).ask(QUESTIONS[0], max_new_tokens=6)
    assert got.answer == expected.answer
    assert got.report.samples == expected.report.samples


@pytest.mark.parametrize("repaired", [True, False])
@pytest.mark.parametrize("options", [{}, {"k": 1.0}], ids=["lossless", "k=1"])
def test_lossless_without_a_mask_and_without_a_cache(repaired, options):
    model = tiny.build()
    if repaired:
        compat.apply(model)
    batch = tiny.inputs(SINGLE)
    del batch["cross_attention_mask"]
    wanted = {"max_new_tokens": 5, "use_cache": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**batch, **wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatWarning)
        with crosstrim.trim(model, **options):
            got = model.generate(**batch, **wanted)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)
