"""The server makes unsure answers again: alone, from the same features, and tells nothing before it is sure."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

import crosstrim
from crosstrim import TrimConfig, mini
from crosstrim.asking import answering
from tests.server.conftest import expected, png
from tests.support.tower import counted

TRIM = {"keep": 3}
QUESTIONS = ["what is it?", "how many are there, all in all?", "why?"]


def asked(server, question, *files, escalate=None, **options):
    wanted = {**TRIM, **({} if escalate is None else {"escalate": escalate}), **options.pop("trim", {})}
    return server.ask(question, *files, extra_body={"crosstrim": wanted}, **options)


def test_an_unsure_answer_is_the_untrimmed_model_s(server, loaded):
    reply = asked(server, "what is it?", png(1), escalate=1.0)
    untrimmed = answering.ask(*loaded, _picture(png(1)), "what is it?", max_new_tokens=6)
    assert reply.choices[0].message.content == untrimmed.answer
    told = reply.usage.crosstrim
    assert (told["escalated"], told["visible"], told["kept"]) == (True, 17, 17)
    first, last = told["attempts"]
    assert (first["budget"], first["kept"], last["budget"], last["kept"]) == ("keep=3", 3, "untrimmed", 17)
    assert first["tokens"] == last["tokens"] == reply.usage.completion_tokens == 6
    sure = asked(server, "what is it?", png(1), escalate=1e-9)
    assert sure.choices[0].message.content == expected(loaded, "what is it?", png(1), TrimConfig(keep=3)).answer
    assert sure.usage.crosstrim["escalated"] is False
    assert [one["kept"] for one in sure.usage.crosstrim["attempts"]] == [3]


def test_probabilities_are_those_that_ask_finds_also_of_a_sampled_answer(server, loaded):
    from crosstrim.asking.escalation import Escalation

    alone = answering.ask(
        *loaded, _picture(png(2)), "why?", TrimConfig(keep=3), max_new_tokens=6, escalation=Escalation(1.0)
    )
    reply = asked(server, "why?", png(2), escalate=1.0)
    for one, other in zip(reply.usage.crosstrim["attempts"], alone.attempts, strict=True):
        assert one["lowest_probability"] == pytest.approx(other.lowest_probability, rel=1e-3)
    drawn = {"temperature": 1.5, "seed": 7, "logprobs": True}
    reply = asked(server, "why?", png(2), escalate=1e-9, **drawn)
    lowest = min(token.logprob for token in reply.choices[0].logprobs.content)
    (only,) = reply.usage.crosstrim["attempts"]
    assert only["lowest_probability"] == pytest.approx(2.718281828**lowest, rel=1e-3)
    again = asked(server, "why?", png(2), escalate=1.0, **drawn)
    whole = server.ask("why?", png(2), extra_body={"crosstrim": {"keep": 1.0}}, **drawn)
    assert again.choices[0].message.content == whole.choices[0].message.content


def test_in_a_batch_only_the_unsure_are_made_again_and_the_tower_runs_once(start, loaded):
    options = {"max_batch": 3, "max_wait_ms": 2000, "trim": TrimConfig(keep=3), "feature_cache_bytes": 0}
    with start(**options) as server, counted(server.service._generator._model) as entered:
        ran, model = [], server.service._generator._model
        generate = model.generate
        model.generate = lambda **options: ran.append(len(options["input_ids"])) or generate(**options)

        def together(escalate):
            wanted = {"escalate": escalate, "escalate_to": [9, "untrimmed"]}
            with ThreadPoolExecutor(3) as pool:
                return list(
                    pool.map(
                        lambda question: server.ask(question, png(3), extra_body={"crosstrim": wanted}), QUESTIONS
                    )
                )

        first = [reply.usage.crosstrim["attempts"] for reply in together(1.0)]
        assert all([one["budget"] for one in attempts] == ["keep=3", "keep=9", "untrimmed"] for attempts in first)
        *_, middle, high = sorted(attempts[0]["lowest_probability"] for attempts in first)
        del entered[:], ran[:]
        replies = together((middle + high) / 2)
        assert entered == [1]
        assert ran[:2] == [3, 2]
        for question, reply, attempts in zip(QUESTIONS, replies, first, strict=True):
            tried = reply.usage.crosstrim["attempts"]
            config = [TrimConfig(keep=3), TrimConfig(keep=9), None][len(tried) - 1]
            alone = answering.ask(*loaded, _picture(png(3)), question, config, max_new_tokens=6)
            assert reply.choices[0].message.content == alone.answer
            assert (len(tried) == 1) is (attempts[0]["lowest_probability"] == high)
        metrics = httpx.get(f"{server.url}/metrics").text
        assert f"crosstrim_escalated_answers_total {3 + 2:.1f}" in metrics


def test_a_stream_is_held_back_until_the_answer_is_the_last(server):
    options = {"max_tokens": 30, "stream_options": {"include_usage": True}}
    whole = asked(server, "what is it?", png(1), escalate=1.0, max_tokens=30)
    *pieces, usage = asked(server, "what is it?", png(1), escalate=1.0, stream=True, **options)
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == whole.choices[0].message.content
    assert usage.usage.crosstrim["escalated"]
    assert usage.usage.crosstrim["attempts"][0]["budget"] == "keep=3"


def test_the_server_s_own_way_is_for_requests_that_do_not_say(start, loaded):
    with start(trim=TrimConfig(keep=3), escalate=1.0, escalate_to=("lossless",)) as server:
        reply = server.ask("why?", png(4))
        assert [one["budget"] for one in reply.usage.crosstrim["attempts"]] == ["keep=3", "lossless"]
        own = server.ask("why?", png(4), extra_body={"crosstrim": {"keep": 5, "escalate": 1e-9}})
        assert [one["budget"] for one in own.usage.crosstrim["attempts"]] == ["keep=5"]
        everything = server.ask("why?", png(4), extra_body={"crosstrim": {"lossless": True}})
        assert "attempts" not in everything.usage.crosstrim
        assert "attempts" not in server.ask("why?").usage.crosstrim  # without a picture
        body = {"model": "tiny", "prompt": "why?", "images": [base64.b64encode(png(4)).decode()], "stream": False}
        answer = httpx.post(f"{server.url}/api/generate", json={**body, "options": {"num_predict": 6}}, timeout=60)
        assert answer.json()["response"] == reply.choices[0].message.content
        assert answer.json()["crosstrim"]["escalated"]


def test_a_schema_is_met_by_the_answer_that_is_made_again(start):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
    named = {"name": "n", "schema": {**schema, "additionalProperties": False}}
    given = {"response_format": {"type": "json_schema", "json_schema": named}, "max_tokens": 40}
    picture = Path(mini.examples()[0]["image"]).read_bytes()
    with start(checkpoint="mini", trim=TrimConfig(keep=3)) as server:
        reply = server.ask("how many?", picture, extra_body={"crosstrim": {"escalate": 1.0}}, **given)
        plain = server.ask("how many?", picture, extra_body={"crosstrim": {"lossless": True}}, **given)
    assert isinstance(json.loads(reply.choices[0].message.content)["n"], int)
    assert reply.choices[0].message.content == plain.choices[0].message.content
    assert reply.usage.crosstrim["escalated"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"escalate": 2.0}, "escalate"),
        ({"escalate_to": ["untrimmed"]}, "escalate_to goes with escalate"),
        ({"lossless": True, "escalate": 0.9}, "drops nothing"),
        ({"keep": 5, "escalate": 0.9, "escalate_to": [4]}, "keeps no more than 5"),
        ({"escalate": 0.9, "escalate_to": ["everything"]}, "escalate_to"),
        ({"escalate": 0.9, "escalate_to": []}, "escalate_to"),
    ],
)
def test_what_makes_no_sense_is_refused(server, wanted, words):
    with pytest.raises(openai.BadRequestError, match=words):
        server.ask("why?", png(), extra_body={"crosstrim": wanted})


def test_a_calibrated_server_makes_answers_again_as_was_calibrated(start, tmp_path, loaded, pictures_with_answers):
    crosstrim.calibrate(
        *loaded, pictures_with_answers, tmp_path / "c.json", keep=[3], risk=0.9, escalate=[0.9], max_new_tokens=2
    )
    with start(trim=TrimConfig.from_calibration(tmp_path / "c.json")) as server:
        reply = server.ask("why?", png(4))
        assert [one["budget"] for one in reply.usage.crosstrim["attempts"]] == ["keep=3", "untrimmed"]
        own = server.ask("why?", png(4), extra_body={"crosstrim": {"keep": 4, "escalate": 1e-9}})
        assert [one["budget"] for one in own.usage.crosstrim["attempts"]] == ["keep=4"]


@pytest.fixture
def pictures_with_answers(tmp_path):
    from crosstrim.data import dataset
    from tests.support.questions import with_answers, write_pictures, write_rows

    write_pictures(tmp_path / "rows")
    return dataset.read(write_rows(tmp_path / "rows", with_answers()))


def _picture(file):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(file))
