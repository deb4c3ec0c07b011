"""The OpenAI-compatible server, as `crosstrim.engines.sglang.launch` starts it."""

from __future__ import annotations

import base64

import openai
import pytest

import crosstrim
from crosstrim import TrimConfig, mini
from crosstrim.engines.sglang import launch
from tests.support import sglang_runs
from tests.support.engine_server import free_port, serving

pytestmark = pytest.mark.sglang

K = 0.1
TOKENS = 12


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    log, port = tmp_path_factory.mktemp("server") / "log.txt", free_port()
    arguments, environment = launch.command(
        "mini", TrimConfig(k=K), device="cpu", port=port, options=["--max-total-tokens", "4096"]
    )
    with serving(arguments, {**sglang_runs.ENVIRONMENT, **environment}, port, log) as url:
        yield openai.OpenAI(base_url=url, api_key="none")


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
