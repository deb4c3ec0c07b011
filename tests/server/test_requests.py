"""What a request may hold: what is refused is named, and what asks for nothing is taken."""

from __future__ import annotations

import httpx2 as httpx
import openai
import pytest

from tests.server.conftest import MODEL, asking, data_uri, png, with_part, with_url


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
        ("service_tier", "flex", "this server does not support service_tier='flex'; leave it out."),
        ("top_k", 40, "this server does not support top_k=40; leave it out."),
        ("repetition_penalty", 1.1, "this server does not support repetition_penalty=1.1; leave it out."),
        ("store", True, "this server does not support store=True; leave it out."),
        ("tools", [{"type": "function"}], "does not support tools=[{'type': 'function'}]; leave it out."),
        ("tool_choice", "required", "this server does not support tool_choice='required'; leave it out."),
        ("reasoning_effort", "low", "this server does not support reasoning_effort; leave it out."),
    ],
)
def test_what_is_not_supported_is_named(server, name, value, words):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello?"}], name: value}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"].partition(".")[0]) == (400, name)
    assert words in error["message"]


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
