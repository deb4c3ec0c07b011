"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import io
import json
import threading
import time

import httpx2 as httpx
import openai
import pytest
from PIL import Image

from crosstrim import TrimConfig
from crosstrim.asking import answering
from crosstrim.server import generation
from crosstrim.server.pictures import open_picture
from crosstrim.server.settings import Settings
from tests.server.conftest import MODEL, asking, data_uri, png
from tests.support.docs import pages

LONG = 450  # tokens, which take the tiny model seconds


def expected(loaded, question, file, config=None, max_new_tokens=6):
    picture = open_picture(data_uri(file), Settings()).image
    return answering.ask(*loaded, picture, question, config or TrimConfig(k=0.25), max_new_tokens=max_new_tokens)


def test_an_answer_is_that_of_ask(server, loaded):
    reply = server.ask("what is it?", png(1, tiles=2))
    alone = expected(loaded, "what is it?", png(1, tiles=2))
    assert reply.choices[0].message.content == alone.answer
    assert (reply.choices[0].finish_reason, reply.model, reply.object) == ("length", MODEL, "chat.completion")
    assert reply.usage.crosstrim == {"visible": alone.report.visible, "kept": alone.report.kept}
    assert (reply.usage.completion_tokens, reply.usage.total_tokens - reply.usage.prompt_tokens) == (6, 6)


@pytest.mark.parametrize(
    ("wanted", "config"),
    [
        ({"k": 0.5}, TrimConfig(k=0.5)),
        ({"keep": 9}, TrimConfig(keep=9)),
        ({"keep": 0.3, "policy": "mean"}, TrimConfig(keep=0.3, policy="mean")),
        ({"lossless": True}, TrimConfig()),
    ],
)
def test_a_request_may_bring_its_own_trim(server, loaded, wanted, config):
    reply = server.ask("what is it?", png(2), extra_body={"crosstrim": wanted})
    alone = expected(loaded, "what is it?", png(2), config)
    assert reply.choices[0].message.content == alone.answer
    assert reply.usage.crosstrim == {"visible": alone.report.visible, "kept": alone.report.kept}


def test_a_stream_s_pieces_are_the_answer(server):
    whole = server.ask("what is it?", png(3), max_tokens=30)
    pieces = list(
        server.ask("what is it?", png(3), max_tokens=30, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == whole.choices[0].message.content
    assert sum(bool(piece.choices[0].delta.content) for piece in pieces[:-1]) > 5
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage == whole.usage
    assert len({piece.id for piece in pieces}) == 1
    assert all("usage" in piece.model_fields_set and piece.usage is None for piece in pieces[:-1])
    assert all("usage" not in piece.model_fields_set for piece in server.ask("a?", max_tokens=2, stream=True))


def test_who_does_not_say_how_much_gets_no_more_than_the_server_gives(start):
    with start(max_new_tokens=5) as server:
        reply = server.ask("what is it?", png(3), max_tokens=None)
        assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (5, "length")
        with pytest.raises(openai.BadRequestError, match="max_tokens=6 is more than this server gives, 5; ask for"):
            server.ask("what is it?", png(3), max_tokens=6)


def test_stop_strings(server):
    whole = server.ask("what is it?", png(3), max_tokens=30).choices[0].message.content
    stop = whole[7:9]
    for options in ({"stop": stop}, {"stop": ["never this", stop]}):
        reply = server.ask("what is it?", png(3), max_tokens=30, **options)
        assert reply.choices[0].message.content == whole[: whole.find(stop)].strip()
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.completion_tokens < 30
        pieces = server.ask("what is it?", png(3), max_tokens=30, stream=True, **options)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert streamed == reply.choices[0].message.content


def test_a_sampled_answer_depends_on_its_seed_and_on_nothing_else(server):
    def draw(seed, **options):
        reply = server.ask("what is it?", png(4), max_tokens=20, temperature=1.5, seed=seed, **options)
        return reply.choices[0].message.content

    first = draw(1)
    others = [
        threading.Thread(target=server.ask, args=("else?", png(n)), kwargs={"max_tokens": 20}) for n in range(3)
    ]
    for one in others:
        one.start()
    assert draw(1) == first
    for one in others:
        one.join()
    assert len({draw(seed) for seed in range(2, 6)} | {first}) > 1
    greedy = server.ask("what is it?", png(4), max_tokens=20).choices[0].message.content
    assert draw(3, top_p=1e-9) == greedy


def test_text_alone_several_pictures_and_earlier_turns(server):
    text = server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello?"}], max_completion_tokens=4
    )
    assert text.usage.crosstrim == {"visible": 0, "kept": 0}
    assert text.usage.completion_tokens == 4
    two = server.ask("and these?", png(1), png(2, tiles=2), extra_body={"crosstrim": {"lossless": True}})
    assert two.usage.crosstrim == {"visible": 51, "kept": 51}
    turns = [{"role": "system", "content": "be brief."}, *asking("what is it?", png(1))]
    turns += [{"role": "assistant", "content": "a 3"}, {"role": "user", "content": "why?"}]
    later = server.client().chat.completions.create(model=MODEL, messages=turns, max_tokens=4)
    assert later.usage.prompt_tokens > server.ask("what is it?", png(1)).usage.prompt_tokens


def test_a_picture_asked_about_again_is_not_encoded_again(start, loaded, monkeypatch):
    from crosstrim.models import vision

    encoded = []
    encode = vision.encode
    monkeypatch.setattr(
        vision, "encode", lambda model, inputs: encoded.append(len(inputs["pixel_values"])) or encode(model, inputs)
    )
    per_picture = 4 * 17 * 64 * 4
    with start(feature_cache_bytes=2 * per_picture) as server:
        files = [png(seed) for seed in range(3)]
        for which in (0, 0, 1, 0, 2, 0, 1):  # 2 pushes 1 out
            reply = server.ask("what is it?", files[which])
            assert reply.choices[0].message.content == expected(loaded, "what is it?", files[which]).answer
        server.ask("the same twice?", files[1], files[1])
        assert encoded == [1, 1, 1, 1]
        assert server.service._generator.cache.bytes == 2 * per_picture


def test_models_and_health(server):
    assert [card.id for card in server.client().models.list()] == [MODEL]
    assert server.client().models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("other")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}
    for path in ("/health", "/ready"):
        reply = httpx.head(f"{server.url}{path}")
        assert (reply.status_code, reply.content) == (200, b"")


def test_where_a_model_s_folder_lies_is_not_told(start, checkpoint):
    folder = str(checkpoint)
    with start(model=folder) as server:
        (card,) = server.client().models.list()
        assert card.id == checkpoint.name
        assert server.client().models.retrieve(card.id) == card
        for name in (card.id, folder):
            reply = server.client().chat.completions.create(model=name, messages=asking("what?"), max_tokens=1)
            assert reply.model == card.id
        with pytest.raises(openai.NotFoundError, match=f"no model 'other' here, only '{card.id}'"):
            server.client().models.retrieve("other")


def test_the_client_in_the_docs_runs_when_pasted(start, tmp_path, monkeypatch, capsys):
    ((_, code),) = pages.snippets("docs/serving.md")
    Image.open(io.BytesIO(png(2))).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    with start(model="meta-llama/Llama-3.2-11B-Vision-Instruct", api_key="secret", max_new_tokens=6) as server:
        exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out.strip().endswith("{'visible': 17, 'kept': 4}")


def test_metrics_count(start):
    with start() as server:
        server.ask("what is it?", png(1), extra_body={"crosstrim": {"keep": 9}})
        with pytest.raises(openai.BadRequestError):
            server.ask(" ")
        until(lambda: "unfinished_requests 0.0" in httpx.get(f"{server.url}/metrics").text)
        page = httpx.get(f"{server.url}/metrics").text.splitlines()
    assert {
        'crosstrim_requests_total{status="200"} 1.0',
        'crosstrim_requests_total{status="400"} 1.0',
        "crosstrim_generated_tokens_total 6.0",
        'crosstrim_image_features_total{what="visible"} 17.0',
        'crosstrim_image_features_total{what="kept"} 9.0',
        "crosstrim_unfinished_requests 0.0",
        f"crosstrim_feature_cache_bytes {4 * 17 * 64 * 4:.1f}",
    } <= set(page)


def with_url(url):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    return {"messages": [{"role": "user", "content": parts}]}


def with_part(part):
    return {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "messages must have at least 1 item after validation, not 0, got []."),
        ({"n": 2}, "this server does not support n=2; leave it out."),
        ({"temperature": 3.0}, "temperature must be less than or equal to 2, got 3.0."),
        ({"max_tokens": "6"}, "max_tokens must be a valid integer, got '6'."),
        ({"max_tokens": 0}, "max_tokens must be greater than or equal to 1, got 0."),
        ({"stop": [""]}, "stop.0 must have at least 1 character, got ''."),
        ({"max_tokens": 5000}, "more than this server gives, 1024"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens=5000 is more than"),
        ({"max_tokens": 511}, "together the model reads 512"),
        ({"crosstrim": {"k": 0.5, "keep": 9}}, "give one of them"),
        ({"crosstrim": {"keep": 1.5}}, "keep=1.5 must be a share"),
        ({"crosstrim": {"policy": "nonsense"}}, "nonsense"),
        ({"crosstrim": {"policy": "oracle", "keep": 0.5}}, "compare with it by `crosstrim eval --out FILE.json"),
        ({"crosstrim": {"keep": "a"}}, "crosstrim.keep must be a valid number, got 'a'."),
        ({"crosstrim": {"kk": 1}}, "this server does not support crosstrim.kk; leave it out."),
        ({"messages": [{"role": "user", "content": " "}]}, "question is empty"),
        ({"messages": [{"role": "user", "content": "a <|image|>?"}]}, "stands for a picture"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages.0.role must be 'system', 'developer', 'user' or",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content must be a valid string, got 5."),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content is missing."),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing."),
        (with_part({"type": "audio"}), "messages.0.content.0 must be an object whose type is 'text' or 'image_url'"),
        (with_part("a"), "messages.0.content.0 must be an object whose type is 'text' or 'image_url', got 'a'."),
        (with_part({"type": "text"}), "messages.0.content.0.text is missing."),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
            "this server does not support messages.0.tool_calls=[{}]; leave it out.",
        ),
        (
            with_part({"type": "image_url", "image_url": "a"}),
            "messages.0.content.0.image_url must be an object, got 'a'.",
        ),
        (with_part({"type": "image_url", "image_url": {}}), "messages.0.content.0.image_url.url is missing."),
        ({"messages": [{"role": "system", "content": asking("a", png())[0]["content"]}]}, "only a user's may"),
        ({"messages": asking("a", *[png()] * 9)}, "has 9 pictures; the limit is 8"),
        (with_url("data:text/plain;base64,AAAA"), "must begin with data:image/"),
        (with_url("data:image/png;base64,?"), "no valid base64"),
        (with_url("data:image/png;base64,AAAA"), "is no picture"),
        (with_url(data_uri(png()[:-30])), "damaged"),
        (with_url("https://pictures.example/a.png"), "--allow-remote-images"),
        (with_url("file:///etc/passwd"), "must be a data:image"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(server, body, words):
    whole = {"model": MODEL, "messages": [{"role": "user", "content": "hello?"}], "max_tokens": 2, **body}
    for stream in (False, True):
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={**whole, "stream": stream})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert words in error["message"]
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "asking_for_nothing",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"response_format": {"type": "text"}, "logprobs": False, "store": False},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"user": "me", "metadata": {"run": "7"}, "seed": -1, "n": 1},
        {"reasoning_effort": None, "audio": None, "crosstrim": {"lossless": None}},
        {"messages": [{"role": "user", "content": "hello?", "name": "me", "refusal": None}]},
        {"service_tier": "auto", "top_k": -1, "repetition_penalty": 1.0, "min_p": 0.0, "length_penalty": 1},
        {"functions": [], "function_call": "none", "top_logprobs": 0, "modalities": ["text"], "top_k": 0},
        {"safety_identifier": "a", "prompt_cache_key": "b", "service_tier": "default"},
        with_part({"type": "text", "text": "hello?", "cache_control": {"type": "ephemeral"}}),
    ],
    ids=lambda body: "-".join(body),
)
def test_fields_that_ask_for_nothing_are_accepted(server, asking_for_nothing):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello?"}], "max_tokens": 2}
    plain, whole = (
        httpx.post(f"{server.url}/v1/chat/completions", json=sent) for sent in (body, body | asking_for_nothing)
    )
    assert whole.status_code == 200, whole.text
    assert whole.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("frequency_penalty", 0.5, "this server does not support frequency_penalty=0.5; leave it out."),
        ("presence_penalty", -1, "this server does not support presence_penalty=-1; leave it out."),
        ("logprobs", True, "this server does not support logprobs=True; leave it out."),
        ("service_tier", "flex", "this server does not support service_tier='flex'; leave it out."),
        ("top_k", 40, "this server does not support top_k=40; leave it out."),
        ("repetition_penalty", 1.1, "this server does not support repetition_penalty=1.1; leave it out."),
        ("store", True, "this server does not support store=True; leave it out."),
        ("tools", [{"type": "function"}], "does not support tools=[{'type': 'function'}]; leave it out."),
        ("tool_choice", "required", "this server does not support tool_choice='required'; leave it out."),
        (
            "response_format",
            {"type": "json_object"},
            "this server does not support response_format.type='json_object'; leave response_format out.",
        ),
        ("reasoning_effort", "low", "this server does not support reasoning_effort; leave it out."),
    ],
)
def test_what_is_not_supported_is_named(server, name, value, words):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello?"}], name: value}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"].partition(".")[0]) == (400, name)
    assert words in error["message"]


def test_a_developer_is_the_system(server):
    asked = []
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "be brief."}, {"role": "user", "content": "hello?"}]
        asked.append(server.client().chat.completions.create(model=MODEL, messages=messages, max_tokens=4))
    assert asked[0].usage == asked[1].usage
    assert asked[0].choices == asked[1].choices


def test_a_message_that_was_received_can_be_sent_back(server):
    received = server.ask("what is it?", png(1)).choices[0].message.model_dump()
    turns = [*asking("what is it?", png(1)), {**received, "content": "a 3"}, {"role": "user", "content": "why?"}]
    assert server.client().chat.completions.create(model=MODEL, messages=turns, max_tokens=2).choices


def test_what_wrappers_put_into_an_answer_can_be_sent_back(server):
    echoed = {"reasoning_content": "", "tool_calls": [], "annotations": [], "audio": None, "provider": {"a": 1}}
    answers = []
    for more in ({}, echoed):
        turns = [*asking("what is it?", png(1)), {"role": "assistant", "content": "a 3", **more}]
        turns.append({"role": "user", "content": "why?"})
        body = {"model": MODEL, "messages": turns, "max_tokens": 2}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        answers.append(reply.json()["choices"])
    assert answers[0] == answers[1]


def test_a_picture_alone_is_a_question(server):
    picture = asking("", png(1))[0]["content"][:1]
    reply = server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": picture}], max_tokens=2
    )
    assert reply.usage.crosstrim["visible"] == 17


def test_a_body_that_is_no_json_is_told_where(server):
    url = f"{server.url}/v1/chat/completions"
    broken = httpx.post(url, content=b'{"model": }', headers={"Content-Type": "application/json"})
    error = broken.json()["error"]
    assert (broken.status_code, error["param"]) == (400, None)
    assert error["message"] == "the body is no JSON: Expecting value, at character 10."
    for body, kind in ((b"[]", "application/json"), (b"{}", "text/plain"), (b"", "application/json")):
        reply = httpx.post(url, content=body, headers={"Content-Type": kind})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, None)
        assert "must be a JSON object, sent with the content type application/json" in reply.text


def test_other_errors_have_the_same_shape(server):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        server.client().chat.completions.create(model="other", messages=asking("a"))
    for method, path, status in [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405)]:
        reply = httpx.request(method, server.url + path)
        assert (reply.status_code, set(reply.json()["error"])) == (status, {"message", "type", "param", "code"})
    broken = httpx.post(f"{server.url}/v1/chat/completions", content=b"{")
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")


def test_pictures_are_limited_before_they_are_decoded(start, monkeypatch):
    large = io.BytesIO()
    Image.new("RGB", (400, 300)).save(large, "PNG")
    wide = io.BytesIO()
    Image.new("RGB", (398, 250)).save(wide, "PNG")
    decoded = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self.size) or load(self))
    with start(max_pixels=100_000, max_image_bytes=5_000) as server:
        with pytest.raises(openai.BadRequestError, match="400 x 300 pixels; the limit is 100000 pixels"):
            server.ask("what?", large.getvalue())
        with pytest.raises(openai.BadRequestError, match="the limit is 5000"):
            server.ask("what?", b"x" * 5_001)
        assert decoded == []
        with pytest.raises(openai.BadRequestError, match="28 x 28 pixels; the limit is 500 pixels"):
            server.ask("what?", wide.getvalue(), png())
        server.ask("what?", png())


def test_large_bodies_are_not_read(start):
    with start(max_image_bytes=10) as server:
        url = f"{server.url}/v1/chat/completions"
        limit = server.service._settings.max_body_bytes
        announced = httpx.post(url, content=b"x" * (limit + 1))

        def endless():
            for _ in range(limit // 1000 + 2):
                yield b" " * 1000

        chunked = httpx.post(url, content=endless())
        for reply in (announced, chunked):
            assert reply.status_code == 413
            assert "which is the limit" in reply.json()["error"]["message"]


def test_a_key_is_asked_for(start):
    with start(api_key="right") as server:
        for key in ("wrong", "righ", "rightt"):
            with pytest.raises(openai.AuthenticationError):
                server.client(key).models.list()
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert httpx.get(server.url + path).status_code == 401
        odd = httpx.get(f"{server.url}/v1/models", headers={"Authorization": b"Bearer \xe9"})
        assert (odd.status_code, odd.headers["www-authenticate"]) == (401, "Bearer")
        basic = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Basic right"})
        assert basic.status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert [card.id for card in server.client("right").models.list()] == [MODEL]


def test_a_full_queue_refuses_and_opens_again(start):
    with start(queue_limit=1) as server:
        stream = server.ask("what?", png(), max_tokens=LONG, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError, match="which is the limit") as refused:
            server.ask("and this?", png())
        assert refused.value.response.headers["retry-after"] == "1"
        stream.close()
        until(lambda: answered(server))


def test_an_answer_that_takes_too_long(start):
    with start(timeout=0.4) as server:
        with pytest.raises(openai.InternalServerError, match="longer than this server allows") as late:
            server.ask("what?", png(), max_tokens=LONG)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(server.ask("what?", png(), max_tokens=LONG, stream=True))
        until(lambda: answered(server))


def test_the_failure_of_the_server_is_not_described(start, monkeypatch, caplog):
    with start() as server:
        monkeypatch.setattr(generation.Generator, "_generate", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError) as failed:
            server.ask("what?", png())
        assert failed.value.status_code == 500
        assert failed.value.response.json()["error"] == {
            "message": "the server failed on this request; its log says why.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        assert "ZeroDivisionError" in caplog.text
        monkeypatch.undo()
        assert answered(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(start, monkeypatch, stream):
    steps, ended = [], threading.Event()
    add, answer = generation._Row.add, generation.Generator.answer

    def watched(self, chats):
        answer(self, chats)
        ended.set()

    monkeypatch.setattr(generation._Row, "add", lambda self, token: steps.append(token) or add(self, token))
    monkeypatch.setattr(generation.Generator, "answer", watched)
    with start() as server:
        body = {"model": MODEL, "messages": asking("what?", png()), "max_tokens": LONG, "stream": stream}
        with httpx.Client(timeout=0.3) as client:
            request = client.build_request("POST", f"{server.url}/v1/chat/completions", json=body)
            if stream:
                reply = client.send(request, stream=True)
                next(reply.iter_lines())
                reply.close()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.send(request)
        assert ended.wait(20)
        assert len(steps) < LONG
        assert answered(server)


def test_one_that_leaves_does_not_disturb_its_batch(start, loaded):
    with start(max_batch=2, max_wait_ms=5_000) as server:
        leaving = server.client().chat.completions.create
        other = []
        asker = threading.Thread(target=lambda: other.append(server.ask("stays?", png(5), max_tokens=60)))
        asker.start()
        stream = leaving(model=MODEL, messages=asking("leaves?", png(6)), max_tokens=LONG, stream=True)
        next(stream)
        stream.close()
        asker.join(30)
        page = httpx.get(f"{server.url}/metrics").text
    alone = expected(loaded, "stays?", png(5), max_new_tokens=60)
    assert other[0].choices[0].message.content == alone.answer
    assert 'crosstrim_batch_size_bucket{le="1.0"} 0.0' in page
    assert 'crosstrim_batch_size_bucket{le="2.0"} 1.0' in page


def test_what_fails_together_is_asked_apart(start, monkeypatch):
    generate = generation.Generator._generate

    def poisoned(self, chats, rows):
        if any("poison" in chat.prompt for chat in chats):
            raise RuntimeError("poison")
        generate(self, chats, rows)

    monkeypatch.setattr(generation.Generator, "_generate", poisoned)
    with start(max_batch=2, max_wait_ms=5_000) as server:
        failed = []

        def poison():
            with pytest.raises(openai.InternalServerError):
                server.ask("poison?", png())
            failed.append(True)

        asker = threading.Thread(target=poison)
        asker.start()
        assert server.ask("what?", png()).choices[0].message.content
        asker.join(30)
        assert failed


def test_remote_pictures_are_fetched_where_allowed(start, monkeypatch):
    from crosstrim.server import pictures

    fetched = []
    monkeypatch.setattr(pictures, "fetch", lambda url, limit: fetched.append((url, limit)) or png(1))
    with start(allow_remote_images=True) as server:
        body = {"model": MODEL, "max_tokens": 6, **with_url("https://pictures.example/a.png")}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    assert fetched == [("https://pictures.example/a.png", 10 << 20)]
    assert reply["choices"][0]["message"]["content"]
    with start(allow_remote_images=True) as server:
        monkeypatch.undo()
        body = {"model": MODEL, **with_url("http://127.0.0.1:1/a.png")}
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert (refused.status_code, "not on the public internet" in refused.text) == (400, True)


def test_a_body_that_drips_is_left(start):
    with start(timeout=0.3) as server:

        def drip():
            for _ in range(20):
                yield b" "
                time.sleep(0.1)

        reply = httpx.post(f"{server.url}/v1/chat/completions", content=drip())
        assert reply.status_code == 408


def test_the_schema_names_what_is_ours(server):
    schema = json.dumps(httpx.get(f"{server.url}/openapi.json").json())
    assert all(f'"{name}"' in schema for name in ("crosstrim", "lossless", "visible", "text/event-stream"))


def answered(server):
    """Whether the server answers again."""
    try:
        return server.ask("still there?", png(), max_tokens=1).choices[0].finish_reason == "length"
    except openai.RateLimitError:
        return False


def until(condition):
    """Wait for what must come true."""
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it never came true")
