"""A request's name, and its line on stderr."""

from __future__ import annotations

import json
import logging

import httpx2 as httpx
import openai
import pytest

from crosstrim.server import generation
from crosstrim.server.log import lines
from tests.server.conftest import MODEL, asking, until


def test_every_answer_bears_the_request_s_name(server):
    url = f"{server.url}/v1/models"
    assert httpx.get(url, headers={"X-Request-Id": "run-7:a.b"}).headers["x-request-id"] == "run-7:a.b"
    names = {httpx.get(url).headers["x-request-id"] for _ in range(2)}
    for odd in ("a b", "a" * 200, "", '"', "é".encode()):
        names.add(httpx.get(url, headers={"X-Request-Id": odd}).headers["x-request-id"])
    assert len(names) == 7
    assert all(len(name) == 32 and name.isalnum() for name in names)
    assert "x-request-id" in httpx.get(f"{server.url}/nothing").headers
    assert server.ask("what?").model_dump()["object"] == "chat.completion"


def test_what_nobody_caught_is_answered_in_the_same_shape(start, monkeypatch, caplog):
    with start() as server:
        monkeypatch.setattr(server.service, "prepare", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(openai.InternalServerError) as failed:
            server.ask("what?")
        assert failed.value.response.headers["x-request-id"]
        assert failed.value.response.json()["error"]["type"] == "server_error"
        assert "MemoryError" in caplog.text
        monkeypatch.undo()
        assert server.ask("what?", max_tokens=1).choices


@pytest.mark.parametrize("kind", ["json", "text"])
def test_a_request_has_one_line(server, capsys, kind):
    with lines(kind):
        body = {"model": MODEL, "messages": asking("what?"), "max_tokens": 1}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"X-Request-Id": "mine"})
        httpx.get(f"{server.url}/no%0Athing?key=secret", headers={"X-Request-Id": "other"})
        for path in ("/health", "/ready", "/metrics"):
            httpx.get(server.url + path)
        written = []
        until(lambda: written.append(capsys.readouterr().err) or "other" in written[-1])
    first, second = (line for line in "".join(written).splitlines())
    if kind == "json":
        first, second = json.loads(first), json.loads(second)
        assert (first["id"], first["path"], first["status"]) == ("mine", "/v1/chat/completions", 200)
        assert (first["method"], first["client"], first["ms"] > 0) == ("POST", "127.0.0.1", True)
        assert (second["path"], second["status"]) == ("/no%0Athing", 404)
    else:
        assert " level=info message=request id=mine client=127.0.0.1 method=POST path=/v1/chat" in first
        assert "path=/no%0Athing status=404 ms=" in second


def test_an_error_is_one_line_with_its_request_s_name(start, monkeypatch, capsys):
    with start() as server, lines("json"):
        capsys.readouterr()  # what loading said
        monkeypatch.setattr(generation.Generator, "_generate", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError) as failed:
            server.ask("what?")
        name = failed.value.response.headers["x-request-id"]
        written: list[str] = []
        until(lambda: written.append(capsys.readouterr().err) or '"request"' in written[-1])
    error, request = map(json.loads, "".join(written).splitlines())
    assert (error["level"], error["id"], request["id"], request["status"]) == ("error", name, name, 500)
    assert "ZeroDivisionError" in error["traceback"]


def test_a_text_line_is_one_line(capsys):
    with lines("text"):
        logging.getLogger("crosstrim.server").error('a "b"\nc=d')
    assert capsys.readouterr().err.endswith(' level=error message="a \\"b\\"\\nc=d"\n')
