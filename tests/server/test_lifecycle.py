"""How the server begins and ends: loading, draining, and a model that works no more."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import openai
import pytest

import crosstrim
from crosstrim import addresses
from crosstrim.errors import EngineError, LoadError
from crosstrim.server import generation, listening, local
from crosstrim.server.chat import Delta, DeviceLostError, Finished
from crosstrim.server.settings import Settings
from tests.server.conftest import asking, png, until


def run_in_thread(settings, ready):
    """`serve_here` in a thread; what it raised."""
    raised = []

    def run():
        try:
            local.serve_here(settings, "127.0.0.1", 0, ready)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


@pytest.fixture
def servers(monkeypatch):
    """uvicorn's servers that were made."""
    made, create = [], listening.Server.__init__
    monkeypatch.setattr(listening.Server, "__init__", lambda self, *given: made.append(self) or create(self, *given))
    return made


@contextlib.contextmanager
def serving(checkpoint, servers, **options):
    """`serve_here` in a thread until the end of the block, and its URL."""
    urls, ready = [], threading.Event()
    settings = Settings(model=str(checkpoint), **options)
    thread, raised = run_in_thread(settings, lambda url: (urls.append(url), ready.set()))
    assert ready.wait(60)
    yield urls[0]
    servers[0].should_exit = True
    thread.join(20)
    assert not thread.is_alive()
    assert raised == []


def test_a_thread_of_the_model_that_ends_is_seen_and_ends_the_server(checkpoint, monkeypatch):
    answering, may = threading.Event(), threading.Event()

    def lost(*_):
        answering.set()
        assert may.wait(20)
        raise DeviceLostError

    monkeypatch.setattr(generation.Generator, "answer", lost)
    monkeypatch.setattr(listening.Server, "on_tick", slowly := Slowly(listening.Server.on_tick))
    urls, ready = [], threading.Event()
    thread, raised = run_in_thread(Settings(model=str(checkpoint)), lambda url: (urls.append(url), ready.set()))
    assert ready.wait(60)
    base, replies = urls[0].removesuffix("/v1"), []
    body = {"model": str(checkpoint), "messages": asking("what?")}
    asker = threading.Thread(
        target=lambda: replies.append(httpx.post(f"{base}/v1/chat/completions", json=body, timeout=20))
    )
    asker.start()
    assert answering.wait(20)
    assert httpx.get(f"{base}/health").status_code == 200
    may.set()
    asker.join(20)
    assert [reply.status_code for reply in replies] == [500]
    for path in ("/health", "/ready"):
        assert httpx.get(base + path).status_code == 503
    late = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=20)
    assert (late.status_code, late.headers["retry-after"]) == (503, "1")
    slowly.go_on.set()
    thread.join(20)
    assert [type(error) for error in raised] == [EngineError]


class Slowly:
    """In place of a method that ends the server: only when it may."""

    def __init__(self, method):
        self.method = method
        self.go_on = threading.Event()

    def __get__(self, server, _):
        async def on_tick(counter):
            return self.go_on.is_set() and await self.method(server, counter)

        return on_tick


def test_a_memory_error_of_one_request_is_its_own(start, monkeypatch):
    with start() as server:
        monkeypatch.setattr(generation.Generator, "answer", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(openai.InternalServerError) as failed:
            server.ask("what?", png())
        assert failed.value.status_code == 500
        assert httpx.get(f"{server.url}/health").status_code == 200
        monkeypatch.undo()
        assert server.ask("what?", png()).choices


def test_until_the_model_is_loaded_the_server_lives_and_is_not_ready(checkpoint, servers, monkeypatch):
    may, load = threading.Event(), local.load
    monkeypatch.setattr(local, "load", lambda *args, **options: may.wait(20) and load(*args, **options))
    taken, listen = [], addresses.listen
    monkeypatch.setattr(addresses, "listen", lambda *at: taken.append(listen(*at)) or taken[0])
    urls = []
    thread, raised = run_in_thread(Settings(model=str(checkpoint)), urls.append)
    until(lambda: servers and servers[0].started)
    base = f"http://127.0.0.1:{taken[0].getsockname()[1]}"
    assert httpx.get(f"{base}/health").json() == {"status": "ok"}
    assert httpx.head(f"{base}/health").status_code == 200
    early = httpx.post(f"{base}/v1/chat/completions", json={})
    assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
    assert httpx.get(f"{base}/ready").headers["retry-after"] == "1"
    early = httpx.post(f"{base}/api/chat", json={})
    assert (early.status_code, early.json()) == (503, {"error": "the model is being loaded; try again later."})
    assert urls == []
    may.set()
    until(lambda: urls)
    assert httpx.get(f"{base}/ready").json() == {"status": "ready"}
    assert httpx.head(f"{base}/ready").status_code == 200
    servers[0].should_exit = True
    thread.join(20)
    assert raised == []


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    thread, raised = run_in_thread(Settings(model=str(tmp_path / "none")), lambda url: None)
    thread.join(30)
    assert [type(error) for error in raised] == [LoadError]


@contextlib.contextmanager
def program(checkpoint, *options):
    command = [Path(sys.executable).with_name("crosstrim"), "serve", "--model", checkpoint, "--port", 0, "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(crosstrim.__file__).parents[1])
    command += ["--device", "cpu", *options]
    running = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    try:
        yield running, json.loads(running.stdout.readline())["url"]
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate()


def test_a_signal_lets_those_in_flight_end_and_refuses_others(checkpoint):
    with program(checkpoint) as (process, url):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        options = {"model": str(checkpoint), "messages": asking("what?", png()), "max_tokens": 120}
        whole = client.chat.completions.create(**options).choices[0].message.content
        stream = client.chat.completions.create(**options, stream=True)
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        base = url.removesuffix("/v1")
        until(lambda: httpx.get(f"{base}/ready").status_code == 503)
        assert httpx.get(f"{base}/health").status_code == 200
        late = httpx.post(f"{url}/chat/completions", json=options)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert late.json()["error"]["code"] == "going_down"
        pieces += list(stream)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
        assert process.wait(20) == 0


def test_draining_ends_with_the_time_that_a_request_may_take(checkpoint, servers):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n"
    with (
        serving(checkpoint, servers, timeout=0.5) as url,
        socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=20) as slow,
    ):
        slow.sendall(head)
        assert slow.recv(1000).startswith(b"HTTP/1.1 100")
        servers[0].handle_exit(signal.SIGTERM, None)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_silent_connection_is_closed(checkpoint, servers, monkeypatch):
    monkeypatch.setattr(listening, "SILENT_SECONDS", 0.3)
    with serving(checkpoint, servers) as url:
        address = ("127.0.0.1", httpx.URL(url).port)
        heads = [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nG"]
        for sent in heads:
            with socket.create_connection(address, timeout=20) as silent:
                silent.sendall(sent)
                received = b""
                with contextlib.suppress(ConnectionResetError):
                    while piece := silent.recv(1000):
                        received += piece
                assert received.startswith(b"HTTP/1.1 200") == (sent is heads[2])
        # Whoever waits for an answer may wait longer than that.
        body = {"model": str(checkpoint), "messages": asking("what?", png()), "max_tokens": 100}
        assert httpx.post(f"{url}/chat/completions", json=body, timeout=60).status_code == 200
        with socket.create_connection(address, timeout=20) as large:
            with contextlib.suppress(ConnectionError):
                large.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * 1_000_000)
            assert large.recv(1000).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("reads", [False, True])
def test_a_client_that_takes_nothing_of_its_stream_is_left(checkpoint, servers, monkeypatch, reads):
    monkeypatch.setattr(listening, "SILENT_SECONDS", 1.0)
    ended: list[bool] = []
    taken = threading.Event()

    def much(_, chats):
        for _ in range(300):  # 30 MB, more than sockets buffer
            chats[0].tell(Delta("x" * 100_000))
        until(lambda: chats[0].cancelled.is_set() or taken.is_set())
        ended.append(chats[0].cancelled.is_set())
        chats[0].tell(Finished("stop", 1, 1, 0, 0))

    monkeypatch.setattr(generation.Generator, "answer", much)
    body = json.dumps({"model": str(checkpoint), "messages": asking("what?"), "stream": True})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with (
        serving(checkpoint, servers) as url,
        socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=20) as reader,
    ):
        reader.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        received = reader.recv(1000)
        assert received.startswith(b"HTTP/1.1 200")
        if reads:  # slowly, for longer than one may be silent
            count = 0
            while piece := reader.recv(1 << 17):
                received, count = received[-100:] + piece, count + len(piece)
                if count > 30_000_000:
                    taken.set()
                time.sleep(0.01)
            assert b"[DONE]" in received
        until(lambda: ended)
    assert ended == [not reads]


def test_a_replica_whose_model_works_no_more_is_not_well():
    from crosstrim.server.ray import check

    check([SimpleNamespace(failure=None)])
    with pytest.raises(EngineError, match="this replica must go"):
        check([SimpleNamespace(failure=MemoryError())])
