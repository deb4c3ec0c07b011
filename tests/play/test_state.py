"""What runs and what is remembered, by counting what enters the vision tower and what is generated."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import crosstrim
from crosstrim import TrimConfig
from crosstrim.asking import answering
from crosstrim.errors import ConfigError, InputError
from crosstrim.play import state
from crosstrim.play.state import PER_CENTS, Playground, config_of
from crosstrim.play.visitor import SupersededError, Visitor, Visitors, Wish
from tests.support.questions import PICTURE, QUESTIONS

CONFIG = TrimConfig(keep=0.2)
TOKENS = 4


@pytest.fixture
def loaded(checkpoint):
    return crosstrim.load(checkpoint)


@pytest.fixture
def generated(loaded, monkeypatch):
    """The most tokens that each generation was to have."""
    lengths, generate = [], loaded[0].generate

    def counting(**options):
        lengths.append(options["max_new_tokens"])
        return generate(**options)

    monkeypatch.setattr(loaded[0], "generate", counting)
    return lengths


@pytest.fixture
def playground(loaded):
    made = Playground(*loaded, max_new_tokens=TOKENS)
    yield made
    made.close()


@pytest.fixture
def cold(playground):
    """A playground that does not warm up, so that generations can be counted."""
    playground._is_warm = True
    return playground


@pytest.fixture
def path(tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def subject(playground, path):
    return playground.open(path)


@pytest.fixture
def held(playground):
    """Keeps the model busy until it is called."""
    gate = threading.Event()
    playground._worker.submit(gate.wait)
    yield gate.set
    gate.set()


class ShortLived(Wish):
    """Superseded once it was looked at so often."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def is_superseded(self):
        self.looks -= 1
        return self.looks < 0


def test_answers_are_those_of_asking(loaded, playground, subject):
    found = playground.compare(subject, QUESTIONS[1], CONFIG, Wish())
    expected = answering.ask(*loaded, PICTURE, QUESTIONS[1], CONFIG, compare=True, max_new_tokens=TOKENS)
    assert (found.trimmed.answer, found.untrimmed.answer) == (expected.answer, expected.untrimmed.answer)
    assert found.report == expected.report
    assert found.same == (expected.answer == expected.untrimmed.answer)


def test_the_model_runs_once_for_each_question_and_trim(cold, subject, generated, tower, path):
    for _ in range(2):
        for question in QUESTIONS[:2]:
            for config in (CONFIG, TrimConfig(k=0.2), TrimConfig(keep=0.2, policy="mean")):
                cold.compare(subject, question, config, Wish())
    assert len(generated) == 2 * (3 + 1)
    again = cold.open(path)  # another visitor's, of the same picture
    cold.compare(again, QUESTIONS[0], CONFIG, Wish())
    assert (len(generated), tower) == (8, [1])
    PICTURE.rotate(180).save(path)
    cold.compare(cold.open(path), QUESTIONS[0], CONFIG, Wish())
    assert (len(generated), tower) == (10, [1, 1])


def test_a_picture_is_encoded_once_whatever_is_asked(cold, subject, tower):
    cold.compare(subject, QUESTIONS[0], CONFIG, Wish())
    cold.chat(subject, QUESTIONS[1], CONFIG, Wish())
    cold.heat(subject, QUESTIONS[2], Wish())
    list(cold.sweep(subject, QUESTIONS[1], "k", None, Wish()))
    assert tower == [1]


def test_times_come_after_a_warm_up_and_without_the_tower(playground, subject, generated):
    playground.compare(subject, QUESTIONS[0], CONFIG, Wish())
    playground.compare(subject, QUESTIONS[1], CONFIG, Wish())
    assert generated == [2, 2, TOKENS, TOKENS, TOKENS, TOKENS]


def test_a_range_of_budgets(cold, subject, generated):
    steps = list(cold.sweep(subject, QUESTIONS[0], "keep", None, Wish()))
    assert [len(points) for points in steps] == list(range(1, len(PER_CENTS) + 1))
    assert [point.per_cent for point in steps[-1]] == list(PER_CENTS)
    kept = [point.comparison.report.kept for point in steps[-1]]
    assert kept == sorted(kept)
    assert kept[-1] == steps[-1][-1].comparison.report.visible
    assert len(generated) == len(PER_CENTS) + 1
    cold.compare(subject, QUESTIONS[0], config_of("keep", PER_CENTS[3], None), Wish())
    assert len(generated) == len(PER_CENTS) + 1


def test_superseded_wishes_that_wait_never_run(cold, subject, generated, held):
    visitor = Visitor()
    with ThreadPoolExecutor() as moves:
        futures = []
        for per_cent in (10, 20, 30, 40):
            wish = visitor.wish("answer")
            futures.append(moves.submit(cold.compare, subject, QUESTIONS[0], config_of("k", per_cent, None), wish))
        held()
        assert [type(future.exception(30)) for future in futures[:-1]] == [SupersededError] * 3
        assert futures[-1].result().report.config.k == 0.4
    assert len(generated) == 2  # trimmed and untrimmed, of the last one


def test_a_wish_that_is_superseded_ends_at_its_next_token_and_is_not_remembered(cold, subject, loaded, generated):
    steps = []
    loaded[0].model.language_model.register_forward_hook(lambda *_: steps.append(None))
    with pytest.raises(SupersededError):
        cold.compare(subject, QUESTIONS[0], CONFIG, ShortLived(looks=4))  # two of them before it runs
    assert len(steps) == 3 < TOKENS
    assert cold.compare(subject, QUESTIONS[0], CONFIG, Wish()).trimmed.tokens == TOKENS
    assert len(generated) == 3


def test_a_question_does_not_wait_for_a_whole_range(cold, subject, loaded, monkeypatch):
    order, asked, generate = [], [], loaded[0].generate

    def interrupted(**options):
        order.append(options["input_ids"].shape[1])
        if len(order) == 1:  # of the range; now somebody asks something else
            asked.append(others.submit(cold.compare, subject, QUESTIONS[1], CONFIG, Wish()))
            while not cold._worker._work_queue.qsize():
                time.sleep(0.01)
        return generate(**options)

    monkeypatch.setattr(loaded[0], "generate", interrupted)
    with ThreadPoolExecutor() as others:
        list(cold.sweep(subject, QUESTIONS[0], "keep", None, Wish()))
        asked[0].result(30)
    of_the_range = order[0]
    assert len(order) == len(PER_CENTS) + 1 + 2
    assert [length == of_the_range for length in order[:5]].count(False) == 2


def test_the_conversation_goes_on_at_any_budget_and_ends(cold, subject, loaded):
    for number, question in enumerate(QUESTIONS[:2]):
        cold.chat(subject, question, config_of("keep", 10 * (number + 1), None), Wish())
    expected = crosstrim.Session(*loaded, PICTURE)
    expected.chat(QUESTIONS[0], config=TrimConfig(keep=0.1), max_new_tokens=TOKENS)
    expected.chat(QUESTIONS[1], config=TrimConfig(keep=0.2), max_new_tokens=TOKENS)
    assert subject.session.turns == expected.turns
    cold.forget(subject)
    assert subject.session.turns == ()


def test_heat_is_that_of_the_leaders_attention(cold, subject, generated, monkeypatch):
    seen = []
    monkeypatch.setattr(state, "heat", lambda picture, saliency, tiling: seen.append(saliency) or picture)
    for _ in range(2):
        cold.heat(subject, QUESTIONS[0], Wish())
    assert generated == [1]
    assert (seen[0] == seen[1]).all()
    # Who ranks by the mean over heads keeps what is warmest.
    few = cold.compare(subject, QUESTIONS[0], TrimConfig(keep=3, policy="mean"), Wish())
    assert sorted(seen[0].topk(3).indices.tolist()) == list(few.report.samples[0][0].kept_indices)


def test_pictures_of_the_page_are_of_the_pictures_shape(cold, path):
    Image.new("RGB", (3000, 1500)).save(path)
    subject = cold.open(path)
    found = cold.compare(subject, QUESTIONS[0], CONFIG, Wish())
    assert cold.overlay(subject, found).size == cold.heat(subject, QUESTIONS[0], Wish()).size == (1200, 600)
    assert subject.picture.size == (3000, 1500)
    assert cold.legend(subject, found).startswith("kept ")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("broken.png", b"\x89PNG\r\n\x1a\nnothing", r"^broken\.png is (damaged|no picture)"),
        ("text.jpg", b"this is a text", r"^text\.jpg is no picture that crosstrim reads"),
        ("empty.png", b"", r"^empty\.png is empty"),
    ],
)
def test_what_is_no_picture_is_refused_without_its_folder(playground, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        playground.open(tmp_path / name)
    assert str(tmp_path) not in str(refused.value)


def test_a_picture_beyond_the_limit_of_ask_is_refused(playground, tmp_path):
    Image.new("1", (8001, 8000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="the limit is 64 million pixels"):
        playground.open(tmp_path / "large.png")


def test_questions_that_cannot_be_asked_run_nothing(cold, subject, generated):
    for question in ("", "a <|image|>", "why " * 3000):
        for verb in (cold.compare, cold.chat):
            with pytest.raises(InputError):
                verb(subject, question, CONFIG, Wish())
    assert generated == []
    assert subject.session.turns == ()


@pytest.mark.parametrize("wrong", [("keeps", 10, None), ("k", 0, None), ("keep", 101, None), ("k", 10, "onion")])
def test_controls_that_say_nothing_are_refused(wrong):
    with pytest.raises(ConfigError):
        config_of(*wrong)


def test_only_so_many_results_are_remembered(cold, subject, generated, monkeypatch):
    monkeypatch.setattr(state, "_REMEMBERED", 2)
    for question in (*QUESTIONS, QUESTIONS[0]):
        cold.compare(subject, question, CONFIG, Wish())
    assert len(generated) == 8


def test_closing_ends_what_waits(loaded, path):
    made = Playground(*loaded)
    subject, gate = made.open(path), threading.Event()
    with ThreadPoolExecutor() as others:
        made._worker.submit(gate.wait)
        waits = others.submit(made.compare, subject, QUESTIONS[0], CONFIG, Wish())
        closes = others.submit(made.close)
        gate.set()
        closes.result(30)
        assert isinstance(waits.exception(30), SupersededError)
    with pytest.raises(SupersededError):
        made.compare(subject, QUESTIONS[0], CONFIG, Wish())


def test_another_picture_supersedes_everything():
    visitor = Visitor()
    with pytest.raises(InputError, match="there is no picture yet; pick an example"):
        _ = visitor.subject
    wishes = [visitor.wish(kind) for kind in ("answer", "answer", "range")]
    assert [wish.is_superseded() for wish in wishes] == [True, False, False]
    visitor.show("a picture")
    assert all(wish.is_superseded() for wish in wishes)
    assert visitor.subject == "a picture"


def test_of_wishes_that_overtake_each_other_the_last_sent_counts():
    visitor = Visitor()
    last, first = visitor.wish("answer", "b", sent=2.0), visitor.wish("answer", "a", sent=1.0)
    assert (last.is_superseded(), first.is_superseded()) == (False, True)
    assert visitor.wish("answer", "b", sent=4.0) is last
    assert visitor.wish("answer", "c", sent=3.0).is_superseded()
    assert not visitor.wish("answer", "d", sent=5.0).is_superseded()
    assert last.is_superseded()


def test_the_same_wish_again_is_no_other():
    visitor = Visitor()
    first = visitor.wish("answer", ("why?", CONFIG))
    assert visitor.wish("answer", ("why?", TrimConfig(keep=0.2))) is first
    assert not first.is_superseded()
    second = visitor.wish("answer", ("how?", CONFIG))
    assert first.is_superseded()
    second.supersede()
    assert visitor.wish("answer", ("how?", CONFIG)) is not second


def test_pictures_of_pages_that_were_closed_or_not_used_are_let_go():
    visitors = Visitors(most=2)
    for key in "ab":
        visitors.of(key).show(key)
    first, second = visitors.of("b"), visitors.of("a")
    wish = first.wish("answer")
    visitors.of("c")
    assert (len(visitors), wish.is_superseded()) == (2, True)
    assert visitors.of("a") is second
    visitors.forget("a")
    visitors.forget("nobody")
    with pytest.raises(InputError):
        _ = second.subject
    assert visitors.of("a") is not second


def test_a_subject_is_small_beside_its_picture():
    picture = Image.fromarray(np.zeros((2400, 100, 3), np.uint8))
    assert state.Subject(picture, None, None).shown().size == (50, 1200)
