"""Sessions against the processor and `generate` on the whole prompt, and the vision tower counted."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import crosstrim
from crosstrim import FeatureCache, Session, TrimConfig
from crosstrim.asking import answering
from crosstrim.errors import AlreadyTrimmedError, ConfigError, InputError, UnsupportedModelError
from crosstrim.models import vision
from tests.support.questions import PICTURE, QUESTIONS

TALL = Image.fromarray(np.random.default_rng(1).integers(0, 256, (84, 28, 3), dtype=np.uint8))
TOKENS = 5


@pytest.fixture
def loaded(checkpoint):
    return crosstrim.load(checkpoint)


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def fresh(loaded, pictures, said, **options):
    """The answer's text and report of a run of the whole conversation that knows no session."""
    model, processor = loaded
    messages = []
    for place, text in enumerate(said):
        role = "assistant" if place % 2 else "user"
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    messages[0]["content"] = [{"type": "image"} for _ in pictures] + messages[0]["content"]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[pictures], text=[prompt], add_special_tokens=False, return_tensors="pt")
    config = answering.for_tokenizer(TrimConfig(**options), processor.tokenizer)
    with crosstrim.trim(model, config) as trimmed:
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip(), len(new), trimmed.report()


OPTIONS = [{"k": 0.05}, {"keep": 0.1, "rating_rows": "last_turn"}, {"keep": 3, "policy": "mean"}, {}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pictures", [[PICTURE], [PICTURE, TALL]], ids=["one", "two"])
def test_every_question_is_answered_as_by_a_fresh_run(loaded, tower, pictures, options):
    session = Session(*loaded, pictures, **options)
    answers = [session.ask(question, max_new_tokens=TOKENS) for question in QUESTIONS]
    assert tower == [len(pictures)]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        text, tokens, report = fresh(loaded, pictures, [question], **options)
        assert (answer.answer, answer.tokens, answer.report.samples) == (text, tokens, report.samples)
    assert session.turns == ()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_turn_of_a_chat_is_a_fresh_run_of_all_of_it(loaded, tower, options):
    session = Session(*loaded, PICTURE, **options)
    said = []
    for question in QUESTIONS:
        answer = session.chat(question, max_new_tokens=TOKENS)
        passes = len(tower)
        text, tokens, report = fresh(loaded, [PICTURE], [*said, question], **options)
        del tower[passes:]
        assert (answer.answer, answer.tokens, answer.report.samples) == (text, tokens, report.samples)
        said += [question, answer.answer]
    assert tower == [1]
    assert session.turns == tuple(zip(said[::2], said[1::2], strict=True))
    session.forget()
    assert session.chat(QUESTIONS[0], max_new_tokens=TOKENS).answer == said[1]


def test_what_one_question_dropped_comes_back_for_the_next(loaded):
    session = Session(*loaded, PICTURE, keep=8)
    kept = [set(session.chat(one).report.samples[0][0].kept_indices) for one in QUESTIONS]
    assert kept[1] - kept[0]
    assert kept[0] - kept[1]


def test_pictures_may_be_paths_and_files(loaded, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    expected = Session(*loaded, PICTURE, keep=5).ask(QUESTIONS[0]).to_dict()["report"]
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), io.BytesIO((tmp_path / "a.png").read_bytes())):
        assert Session(*loaded, source, keep=5).ask(QUESTIONS[0]).to_dict()["report"] == expected


def test_sessions_share_a_cache(loaded, tower):
    cache = FeatureCache()
    for _ in range(2):
        Session(*loaded, PICTURE.copy(), cache=cache).ask(QUESTIONS[0], max_new_tokens=1)
    assert tower == [1]
    Session(*loaded, [TALL, PICTURE], cache=cache).ask(QUESTIONS[0], max_new_tokens=1)
    assert tower == [1, 1]
    assert len(cache) == 2


def test_what_a_shared_cache_let_go_is_encoded_again(loaded, tower):
    cache = FeatureCache(max_bytes=0)
    session = Session(*loaded, PICTURE, cache=cache, keep=5)
    answers = [session.ask(QUESTIONS[0], max_new_tokens=TOKENS).answer for _ in range(2)]
    assert tower == [1, 1]
    assert answers[0] == answers[1]


def test_sessions_of_one_model_may_be_asked_from_many_threads(loaded):
    pictures = [PICTURE, TALL, PICTURE.transpose(Image.Transpose.ROTATE_90)]
    sessions = [Session(*loaded, picture, keep=4) for picture in pictures]
    expected = [[one.ask(question, max_new_tokens=TOKENS).answer for question in QUESTIONS] for one in sessions]
    found = [None] * len(sessions)

    def work(place):
        found[place] = [sessions[place].ask(question, max_new_tokens=TOKENS).answer for question in QUESTIONS]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(sessions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_turns_from_many_threads_follow_each_other(loaded):
    session = Session(*loaded, PICTURE, keep=4)
    threads = [
        threading.Thread(target=session.chat, args=(question,), kwargs={"max_new_tokens": TOKENS})
        for question in QUESTIONS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Session(*loaded, PICTURE, keep=4)
    for question, answer in session.turns:
        assert again.chat(question, max_new_tokens=TOKENS).answer == answer
    assert len(again.turns) == len(QUESTIONS)


def test_given_features_are_for_their_thread_alone(loaded):
    model, processor = loaded
    inputs = answering.encode(processor, [PICTURE], ["?"])
    other = answering.encode(processor, [TALL], ["?"])
    with torch.no_grad():
        expected = model(**inputs).logits
        found = []

        def work():
            with torch.no_grad():
                found.append(model(**inputs).logits)

        with vision.given(model, vision.encode(model, other)):
            assert not torch.equal(model(**inputs).logits, expected)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert torch.equal(found[0], expected)


def test_a_trim_on_the_model_is_refused_with_the_remedy(loaded):
    model, processor = loaded
    session = Session(model, processor, PICTURE, k=0.5)
    with crosstrim.trim(model, k=0.1):
        with pytest.raises(AlreadyTrimmedError, match=r"call remove\(\).*give the session its config"):
            Session(model, processor, PICTURE)
        with pytest.raises(AlreadyTrimmedError, match="trims for each question itself"):
            session.chat("what?")
    assert session.turns == ()
    assert session.chat("what?", max_new_tokens=1).tokens == 1
    with crosstrim.trim(model, k=0.1):  # nothing of the session is left on the model
        pass


@pytest.mark.parametrize(
    ("question", "options", "error"),
    [
        (" ", {}, InputError),
        ("a <|image|>", {}, InputError),
        (3, {}, InputError),
        ("what?", {"max_new_tokens": 0}, ConfigError),
    ],
)
def test_a_question_that_cannot_be_asked_changes_nothing(loaded, tower, question, options, error):
    model, processor = loaded
    session = Session(model, processor, PICTURE)
    before = hooks(model)
    with pytest.raises(error):
        session.chat(question, **options)
    assert (session.turns, hooks(model), tower, len(session.cache)) == ((), before, [], 0)


def test_a_failure_is_no_turn_and_leaves_no_hook(loaded, monkeypatch):
    model, processor = loaded
    session = Session(model, processor, PICTURE)
    before = hooks(model)
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.chat("what?")
    assert (session.turns, hooks(model)) == ((), before)
    assert session.chat("what?", max_new_tokens=2).tokens == 2


def test_whatever_the_model_generates_by_default_a_session_decodes_greedily(loaded):
    model, _ = loaded
    expected = Session(*loaded, PICTURE, k=0.5).ask("what?", max_new_tokens=TOKENS)
    model.generation_config.update(num_beams=2, return_dict_in_generate=True, do_sample=True, num_return_sequences=2)
    got = Session(*loaded, PICTURE, k=0.5).ask("what?", max_new_tokens=TOKENS)
    assert (got.answer, got.report) == (expected.answer, expected.report)


def test_model_and_processor_the_wrong_way_round(loaded):
    with pytest.raises(UnsupportedModelError, match="expected a loaded model, got MllamaProcessor"):
        Session(*reversed(loaded), PICTURE)


def test_pictures_that_cannot_be_used(loaded, tmp_path):
    PICTURE.save(whole := io.BytesIO(), format="PNG")
    cut_off = Image.open(io.BytesIO(whole.getvalue()[:-200]))
    cache = FeatureCache()
    for images, wording in [
        ([], "none was given"),
        (tmp_path / "no.png", "there is no picture"),
        ([PICTURE, cut_off], "a picture cannot be used"),
        (None, r"a PIL image, a path or a file, not a NoneType"),
        (np.asarray(PICTURE), r"not a ndarray; PIL\.Image\.fromarray"),
    ]:
        with pytest.raises(InputError, match=wording):
            Session(*loaded, images, cache=cache)
    assert len(cache) == 0


def test_options_are_those_of_trim(loaded):
    config = TrimConfig(k=0.5)
    assert Session(*loaded, PICTURE, config).config == Session(*loaded, PICTURE, k=0.5).config == config
    with pytest.raises(ConfigError, match="not both"):
        Session(*loaded, PICTURE, config, k=0.5)
    with pytest.raises(ConfigError, match=r"did you mean Session\(model, processor, images, k=0.5\)"):
        Session(*loaded, PICTURE, 0.5)
    with pytest.raises(ConfigError, match=r"expected a TrimConfig, got 0\.5"):
        Session(*loaded, PICTURE).ask("what?", config=0.5)


def test_without_a_chat_template_there_is_one_turn(loaded):
    model, processor = loaded
    processor.chat_template = None
    session = Session(model, processor, [PICTURE, TALL])
    assert session.ask("the picture shows", max_new_tokens=2).tokens == 2
    assert session.chat("the picture shows", max_new_tokens=2).tokens == 2
    with pytest.raises(InputError, match="no chat template"):
        session.chat("and also")
    assert len(session.turns) == 1


def test_a_question_may_bring_its_own_trim(loaded, tower):
    session = Session(*loaded, PICTURE, keep=4)
    session.encode()
    assert (tower, len(session.cache)) == ([1], 1)
    other = TrimConfig(keep=7, rating_rows="last_turn")
    expected = Session(*loaded, PICTURE, other, cache=session.cache)
    for verb in ("ask", "chat"):
        mine = getattr(session, verb)(QUESTIONS[1], max_new_tokens=TOKENS, config=other)
        theirs = getattr(expected, verb)(QUESTIONS[1], max_new_tokens=TOKENS)
        assert (mine.answer, mine.report) == (theirs.answer, theirs.report)
    assert session.ask(QUESTIONS[1], max_new_tokens=1).report.kept == 4
    assert tower == [1]


def test_the_untrimmed_model_reads_the_same_features(loaded, tower):
    session = Session(*loaded, PICTURE, keep=1)
    answer = session.ask_untrimmed(QUESTIONS[1], max_new_tokens=TOKENS)
    passes = list(tower)
    expected = answering.ask(*loaded, PICTURE, QUESTIONS[1], max_new_tokens=TOKENS)
    assert (answer.answer, answer.tokens, answer.report) == (expected.answer, expected.tokens, None)
    assert (passes, session.turns) == ([1], ())


def test_an_answer_ends_where_it_is_told_to(loaded):
    session, told = Session(*loaded, PICTURE, keep=4), []

    def stop():
        told.append(None)
        return len(told) == 3

    assert session.ask(QUESTIONS[1], max_new_tokens=8, stop=stop).tokens == 3
    told.clear()
    assert session.ask_untrimmed(QUESTIONS[1], max_new_tokens=8, stop=stop).tokens == 3
