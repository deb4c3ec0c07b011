from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from dataclasses import dataclass

import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

import crosstrim
from crosstrim import TrimConfig
from crosstrim.asking import answering
from crosstrim.server.app import build
from crosstrim.server.service import Service
from crosstrim.server.settings import Settings

MODEL = "tiny"
LONG = 450  # tokens, which take the tiny model seconds


def png(seed=0, tiles=1):
    """A picture's file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28 * tiles, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_uri(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def asking(question, *files):
    """The messages of one question about pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(file)}} for file in files]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def with_url(url):
    """What asks about the picture at an address."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    return {"messages": [{"role": "user", "content": parts}]}


def with_part(part):
    """What a user says in one part."""
    return {"messages": [{"role": "user", "content": [part]}]}


def expected(loaded, question, file, config=None, max_new_tokens=6):
    """What `ask` answers."""
    picture = Image.open(io.BytesIO(file))
    return answering.ask(*loaded, picture, question, config or TrimConfig(k=0.25), max_new_tokens=max_new_tokens)


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


@dataclass(frozen=True)
class Server:
    url: str
    service: Service

    def client(self, key="none", **options):
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def ask(self, question, *files, **options):
        """A whole answer."""
        options = {"max_tokens": 6, **options}
        return self.client().chat.completions.create(model=MODEL, messages=asking(question, *files), **options)


@pytest.fixture(scope="session")
def start(checkpoint):
    """Start a server in a thread, on a model of its own: only one thread at a time may trim a model."""
    tiny = checkpoint

    @contextlib.contextmanager
    def starting(checkpoint=tiny, **options):
        settings = Settings(**{"model": MODEL, **options})
        service = Service(*crosstrim.load(checkpoint), settings)
        app = build(service, settings)
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", service)
        finally:
            server.should_exit = True
            thread.join(30)
            listening.close()
            assert not thread.is_alive()

    return starting


@pytest.fixture(scope="session")
def server(start):
    """A server as it is by default; it trims at k=0.25. One model, so one server at a time runs it."""
    with start() as running:
        yield running
