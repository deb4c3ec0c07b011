"""The OpenAI-compatible server, as `crosstrim.engines.sglang.launch` starts it."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest

import crosstrim
from crosstrim import TrimConfig, mini
from crosstrim.engines.sglang import launch
from tests.support import sglang_runs

pytestmark = pytest.mark.sglang

K = 0.1
TOKENS = 12


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    log, port = tmp_path_factory.mktemp("server") / "log.txt", free_port()
    arguments, environment = launch.command(
        "mini", TrimConfig(k=K), device="cpu", port=port, options=["--max-total-tokens", "4096"]
    )
    with log.open("w") as output:
        server = subprocess.Popen(
            arguments,
            env={**os.environ, **sglang_runs.ENVIRONMENT, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 240
        while not healthy(port):
            assert server.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        server.terminate()
        server.wait(timeout=60)


def healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_streaming_gives_the_answer_of_transformers(client):
    model, processor = crosstrim.load("mini")[0], sglang_runs.processor_of(mini.path())
    row = next(row for row in mini.heldout() if row["layout"] == "2x2")
    with open(row["image"], "rb") as file:
        url = "data:image/jpeg;base64," + base64.b64encode(file.read()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
    stream = client.chat.completions.create(
        model="mini",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    request = sglang_runs.request(processor, row["question"], [row["image"]], TOKENS)
    (wanted,) = sglang_runs.reference(model, processor, [request], k=K)
    assert "".join(pieces) == processor.tokenizer.decode(wanted)
    assert sum(map(bool, pieces)) > 1  # piece by piece


def test_the_same_question_twice_has_the_same_answer(client):
    """Nothing of a request stays behind for the next one."""
    ask = {"model": "mini", "temperature": 0, "max_tokens": 8}
    ask["messages"] = [{"role": "user", "content": "What colour is the 2?"}]
    answers = {client.chat.completions.create(**ask).choices[0].message.content for _ in range(3)}
    assert len(answers) == 1
