"""Limits, keys, and what becomes of requests that fail, take too long, or are given up."""

from __future__ import annotations

import io
import threading
import time

import httpx2 as httpx
import openai
import pytest
from PIL import Image

from crosstrim.server import gate, generation
from tests.server.conftest import LONG, MODEL, answered, asking, expected, png, until, with_url


def test_pictures_are_limited_before_they_are_decoded(start, monkeypatch):
    large = io.BytesIO()
    Image.new("RGB", (400, 300)).save(large, "PNG")
    wide = io.BytesIO()
    Image.new("RGB", (398, 250)).save(wide, "PNG")
    Image.init()  # it loads pictures of its own
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
    with start(api_keys=("right",)) as server:
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


def test_while_keys_are_changed_both_are_taken(start):
    with start(api_keys=("new", "old")) as server:
        for key in ("new", "old"):
            assert server.client(key).models.list()
        for key in ("new old", "new,old", "ne"):
            assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 401


def test_the_schema_says_where_the_key_is_asked_for(start, server):
    with start(api_keys=("right",)) as closed:
        schema = httpx.get(f"{closed.url}/openapi.json").json()
    assert schema["components"]["securitySchemes"] == {
        "HTTPBearer": {"type": "http", "scheme": "bearer", "description": "The server's API key."}
    }
    asked = {path for path, operations in schema["paths"].items() for one in operations.values() if "security" in one}
    theirs = {f"/api/{name}" for name in ("chat", "generate", "tags", "ps", "show", "version")}
    assert asked == {"/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/metrics"} | theirs
    assert "securitySchemes" not in httpx.get(f"{server.url}/openapi.json").json()["components"]


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


def test_a_body_that_stays_away_is_left_and_gives_up_its_place(start, monkeypatch):
    monkeypatch.setattr(gate, "SILENT_SECONDS", 0.3)
    with start(queue_limit=1) as server:

        def begun():
            yield b"{"
            time.sleep(2)

        assert httpx.post(f"{server.url}/v1/chat/completions", content=begun()).status_code == 408
        until(lambda: answered(server))


def test_a_body_that_drips_is_left(start):
    with start(timeout=0.3) as server:

        def drip():
            for _ in range(20):
                yield b" "
                time.sleep(0.1)

        reply = httpx.post(f"{server.url}/v1/chat/completions", content=drip())
        assert reply.status_code == 408
