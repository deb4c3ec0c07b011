"""Answers that were unsure are made again from the same features, each sample for itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

import crosstrim
from crosstrim import TrimConfig, mini
from crosstrim.asking import answering
from crosstrim.asking.batches import Encoder
from crosstrim.asking.escalation import Escalation
from crosstrim.asking.sureness import ends_of
from crosstrim.errors import ConfigError
from tests.support.questions import PICTURE, QUESTIONS

TOKENS = 4
TRIM = TrimConfig(keep=2)


@pytest.fixture(scope="module")
def small():
    """Mini, and four questions of which the last takes several tokens to answer."""
    example = mini.examples()[0]
    asked = [row["question"] for row in example["questions"]]
    return *crosstrim.load("mini"), Image.open(example["image"]).convert("RGB"), [*asked[:3], "Read all the digits."]


def by_teacher_forcing(model, inputs, tokens):
    """The lowest probability and the number of each sample's tokens up to the one that ends it."""
    found, ends = [], ends_of(model)
    prompt = inputs["input_ids"].shape[1]
    masks = dict(inputs)
    whole = torch.cat([inputs["input_ids"], tokens], 1)
    masks["input_ids"] = whole
    masks["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    masks["cross_attention_mask"] = torch.cat(
        [inputs["cross_attention_mask"], inputs["cross_attention_mask"][:, -1:].expand(-1, tokens.shape[1], -1, -1)],
        1,
    )
    with torch.no_grad():
        probabilities = model(**masks).logits[:, prompt - 1 : -1].softmax(-1)
    for row, answer in zip(probabilities, tokens, strict=True):
        own = []
        for step, token in zip(row, answer.tolist(), strict=True):
            own.append(float(step[token]))
            if token in ends:
                break
        found.append((min(own), len(own)))
    return found


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 3.0, "top_p": 0.9}])
def test_lowest_probabilities_are_those_of_the_answers_tokens(small, options):
    model, processor, picture, questions = small
    inputs = answering.encode(processor, [picture] * 4, questions)
    torch.manual_seed(0)
    found = answering.generate(model, processor, inputs, max_new_tokens=12, how_sure=True, **options)
    assert len(set((found.tokens != model.generation_config.pad_token_id).sum(1).tolist())) > 1  # some end early
    for one, (lowest, tokens) in zip(found.sureness, by_teacher_forcing(model, inputs, found.tokens), strict=True):
        assert one.lowest_probability == pytest.approx(lowest, rel=1e-4)
        assert one.tokens == tokens
    torch.manual_seed(0)
    again = answering.generate(model, processor, inputs, max_new_tokens=12, **options)
    assert torch.equal(found.tokens, again.tokens)
    assert again.sureness == ()


def settled(loaded, questions, escalation, pictures=(PICTURE,)):
    model, processor = loaded
    with Encoder(model, processor).asked([list(pictures)] * len(questions), questions) as inputs:
        return answering.settle(model, processor, inputs, TRIM, escalation, TOKENS)


def test_unsure_answers_are_the_untrimmed_models_and_the_others_stay(loaded, tower):
    model, processor = loaded
    first = [one.attempts[0] for one in settled(loaded, QUESTIONS, Escalation(1e-9))]
    assert all(len(one.attempts) == 1 for one in settled(loaded, QUESTIONS, Escalation(1e-9)))
    *_, middle, high = sorted(one.lowest_probability for one in first)
    del tower[:]
    found = settled(loaded, QUESTIONS, Escalation((middle + high) / 2))
    assert tower == [1]  # one picture, asked about three times and twice again
    for one, question, attempt in zip(found, QUESTIONS, first, strict=True):
        again = attempt.lowest_probability < high
        config = None if again else TRIM
        alone = answering.ask(model, processor, PICTURE, question, config, max_new_tokens=TOKENS)
        assert one.text == alone.answer
        if again:
            with Encoder(model, processor).asked([[PICTURE]], [question]) as inputs:
                untrimmed = answering.generate(model, processor, inputs, max_new_tokens=TOKENS)
            assert torch.equal(one.tokens, untrimmed.tokens[0])
        assert [tried.budget for tried in one.attempts] == ["keep=2", "untrimmed"][: 1 + again]
        assert replace(one.attempts[0], seconds=0) == replace(attempt, seconds=0)
        assert one.attempts[0].kept == 2
        assert (one.attempts[-1].kept == one.attempts[0].visible) is again
        assert bool(one.images) is not again


def test_what_becomes_of_a_sample_does_not_depend_on_its_mates(loaded):
    together = settled(loaded, QUESTIONS, Escalation(1.0))
    for place, question in enumerate(QUESTIONS):
        (alone,) = settled(loaded, [question], Escalation(1.0))
        assert alone.text == together[place].text
        pairs = zip(alone.attempts, together[place].attempts, strict=True)
        for one, other in pairs:
            assert (one.budget, one.kept) == (other.budget, other.kept)
            assert one.lowest_probability == pytest.approx(other.lowest_probability, rel=1e-4)


def test_rungs_are_climbed_until_an_answer_is_sure(loaded):
    up = Escalation.of(TRIM, 1.0, [4, 6, "lossless"])
    (one,) = settled(loaded, QUESTIONS[:1], up)
    assert [tried.budget for tried in one.attempts] == ["keep=2", "keep=4", "keep=6", "lossless"]
    assert [tried.kept for tried in one.attempts][:3] == [2, 4, 6]
    assert one.attempts[-1].kept == one.attempts[0].visible
    sure = max(tried.lowest_probability for tried in one.attempts[:-1])
    place = next(place for place, tried in enumerate(one.attempts) if tried.lowest_probability == sure)
    (again,) = settled(loaded, QUESTIONS[:1], replace(up, below=sure))
    assert len(again.attempts) == place + 1


@pytest.mark.parametrize("escalate_to", ["untrimmed", "lossless"])
def test_a_session_answers_again_from_the_features_in_hand(loaded, tower, escalate_to):
    model, processor = loaded
    session = crosstrim.Session(model, processor, [PICTURE, PICTURE], TRIM, escalate=1.0, escalate_to=escalate_to)
    plain = crosstrim.Session(model, processor, [PICTURE, PICTURE], cache=session.cache)
    for question in QUESTIONS:
        found = session.ask(question, max_new_tokens=TOKENS)
        assert found.answer == plain.ask(question, max_new_tokens=TOKENS).answer
        assert found.escalated
        assert found.tokens == TOKENS
        assert (found.report is None) is (escalate_to == "untrimmed")
        told = found.to_dict()
        assert told["escalated"]
        assert [one["budget"] for one in told["attempts"]] == ["keep=2", escalate_to]
        assert sum(one["seconds"] for one in told["attempts"]) <= found.seconds
    assert tower == [1]


def test_a_turn_that_was_answered_again_is_remembered_as_such(loaded):
    model, processor = loaded
    talks = [
        crosstrim.Session(model, processor, PICTURE, options.pop("config"), **options)
        for options in ({"config": TRIM, "escalate": 1.0}, {"config": None})
    ]
    for question in QUESTIONS[:2]:
        found, plain = (talk.chat(question, max_new_tokens=TOKENS).answer for talk in talks)
        assert found == plain


def test_asked_once_the_tower_runs_once(loaded, tower):
    ask = partial(answering.ask, *loaded, PICTURE, QUESTIONS[0], max_new_tokens=TOKENS)
    found = ask(TRIM, escalation=Escalation(1.0))
    assert tower == [1]
    assert found.answer == ask().answer
    sure = ask(TRIM, escalation=Escalation(1e-9))
    assert not sure.escalated
    assert sure.answer == ask(TRIM).answer
    assert sure.report.kept == 2
    assert "attempts" not in ask(TRIM).to_dict()


@pytest.mark.parametrize(
    ("below", "to", "words"),
    [
        (0, "untrimmed", "escalate=0 "),
        (1.5, "untrimmed", "escalate=1.5 "),
        (True, "untrimmed", "escalate=True "),
        ("0.9", "untrimmed", "escalate='0.9' "),
        (0.9, [], r"escalate_to=\[\]"),
        (0.9, "everything", "escalate_to='everything'"),
        (0.9, 2, "escalate_to=2 .*keep=2|escalate_to=2 keeps no more than 2"),
        (0.9, [4, 3], "escalate_to=3 keeps no more than 4"),
        (0.9, ["untrimmed", 3], "escalate_to=3 keeps no more than 'untrimmed'"),
        (0.9, ["lossless", "untrimmed"], "escalate_to='untrimmed' keeps no more than 'lossless'"),
        (0.9, 1.5, "keep=1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(below, to, words):
    with pytest.raises(ConfigError, match=words):
        Escalation.of(TRIM, below, to)


@pytest.mark.parametrize("config", [TrimConfig(), TrimConfig(keep=1.0), TrimConfig(k=1.0)])
def test_where_nothing_is_dropped_there_is_nothing_to_make_again(config):
    with pytest.raises(ConfigError, match="drops nothing"):
        Escalation.of(config, 0.9)
