"""Asking through the API: what comes back, and that the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import crosstrim
from crosstrim.asking import answering
from crosstrim.errors import AlreadyTrimmedError, ConfigError, InputError
from crosstrim.models import mllama, vision
from tests.support.questions import PICTURE


@pytest.fixture
def loaded(checkpoint):
    return crosstrim.load(checkpoint)


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_without_a_config_the_model_runs_as_it_is(loaded):
    answer = answering.ask(*loaded, PICTURE, "what?", max_new_tokens=3)
    assert (answer.tokens, answer.report, answer.untrimmed) == (3, None, None)
    assert set(answer.to_dict()) == {"answer", "tokens", "seconds"}


def test_compare_holds_both_answers(loaded):
    plain = answering.ask(*loaded, PICTURE, "what?", max_new_tokens=3)
    both = answering.ask(*loaded, PICTURE, "what?", crosstrim.TrimConfig(keep=1), compare=True, max_new_tokens=3)
    assert both.untrimmed.answer == plain.answer
    assert both.untrimmed.report is None
    assert both.report.kept == 1


def test_the_model_is_left_as_it_was(loaded):
    model, processor = loaded
    before = hooks(model)
    answering.ask(model, processor, PICTURE, "what?", crosstrim.TrimConfig(k=0.5), compare=True, max_new_tokens=2)
    for question, options, error in [
        ("", {}, InputError),
        ("a <|image|> b", {}, InputError),
        ("what?", {"max_new_tokens": 0}, ConfigError),
    ]:
        with pytest.raises(error):
            answering.ask(model, processor, PICTURE, question, crosstrim.TrimConfig(), **options)
    assert hooks(model) == before
    with crosstrim.trim(model), pytest.raises(AlreadyTrimmedError):
        answering.ask(model, processor, PICTURE, "what?", crosstrim.TrimConfig())
    assert hooks(model) == before


def test_a_failure_inside_generate_leaves_no_hook(loaded, monkeypatch):
    model, processor = loaded
    before = hooks(model)
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answering.ask(model, processor, PICTURE, "what?", crosstrim.TrimConfig(k=0.5))
    assert hooks(model) == before


def test_a_base_model_without_a_chat_template_completes_the_text(loaded):
    model, processor = loaded
    processor.chat_template = None
    inputs = answering.encode(processor, [PICTURE], ["the picture shows"])
    text = processor.decode(inputs["input_ids"][0])
    assert text == "<|image|><|begin_of_text|>the picture shows"
    assert answering.ask(model, processor, PICTURE, "the picture shows", max_new_tokens=2).tokens == 2


def test_batches_are_padded_on_the_left(loaded):
    _, processor = loaded
    inputs = answering.encode(processor, [PICTURE, PICTURE], ["a much longer question?", "what?"])
    assert inputs["attention_mask"][1, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


@pytest.mark.parametrize("trimmed", [False, True])
def test_given_features_answer_as_the_picture_does(loaded, trimmed):
    model, processor = loaded
    other = PICTURE.transpose(Image.Transpose.ROTATE_90)
    inputs = answering.encode(processor, [PICTURE, other], ["what?", "where is it?"])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def generate():
        if not trimmed:
            return model.generate(**inputs, **options), None
        with crosstrim.trim(model, k=0.2) as handle:
            return model.generate(**inputs, **options), handle.report()

    expected, expected_report = generate()
    features = vision.encode(model, inputs)
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    inputs = blank  # whatever the answer, it must come from the features
    with vision.given(model, features):
        found, found_report = generate()
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5)
    if trimmed:
        assert found_report.samples == expected_report.samples


def room(model, processor, question) -> int:
    """Tokens that are left for an answer."""
    return mllama.max_tokens(model) - answering.encode(processor, [PICTURE], [question])["input_ids"].shape[1]


def nothing_runs(monkeypatch, model):
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    tower = model.model.vision_model
    monkeypatch.setattr(tower, "forward", lambda *_, **__: pytest.fail("the vision tower ran"))


@pytest.mark.parametrize("config", [None, crosstrim.TrimConfig(k=0.5)])
def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(loaded, monkeypatch, config):
    model, processor = loaded
    question = "what? " * (room(model, processor, "?") // 6)  # so that little room is left
    left = room(model, processor, question)
    assert answering.ask(*loaded, PICTURE, question, config, max_new_tokens=left).tokens <= left < 10
    nothing_runs(monkeypatch, model)
    limit = mllama.max_tokens(model)
    words = (
        f"the prompt has {limit - left} tokens and the answer may have {left + 1}; together the model reads {limit}"
    )
    with pytest.raises(InputError, match=rf"{words}\. Shorten the prompt, or lower max_new_tokens\."):
        answering.ask(*loaded, PICTURE, question, config, compare=config is not None, max_new_tokens=left + 1)
    inputs = answering.encode(processor, [PICTURE, PICTURE], ["?", question])
    with pytest.raises(InputError, match=words):
        answering.generate(model, processor, inputs, max_new_tokens=left + 1)


def test_a_session_refuses_a_turn_that_does_not_fit_and_goes_on(loaded, monkeypatch):
    model, processor = loaded
    session = crosstrim.Session(model, processor, PICTURE)
    with monkeypatch.context() as patch:
        nothing_runs(patch, model)
        with pytest.raises(InputError, match="tokens and the answer may have 4; together the model reads"):
            session.chat("what? " * mllama.max_tokens(model), max_new_tokens=4)
    assert session.turns == ()
    assert session.chat("what?", max_new_tokens=1).tokens == 1
