"""vLLM's OpenAI-compatible server, as `crosstrim.engines.vllm.launch` starts it; two tensor-parallel ranks."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from crosstrim import TrimConfig
from crosstrim.engines.vllm import launch
from tests.support import vllm_runs as runs
from tests.support.docs import pages
from tests.support.engine_server import free_port, serving

pytestmark = pytest.mark.vllm

TOKENS = 12
KEEP = 0.3
OPTIONS = ["--enforce-eager", "--max-model-len", "512", "--block-size", "32", "--num-gpu-blocks-override", "200"]
OPTIONS += ["--kv-cache-memory-bytes", str(64 << 20), "--limit-mm-per-prompt", '{"image": 2}']
OPTIONS += ["--trust-request-mm-kwargs"]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    log, port = tmp_path_factory.mktemp("server") / "log.txt", free_port()
    arguments, environment = launch.command(
        "mini", TrimConfig(keep=KEEP), port=port, tensor_parallel=2, options=OPTIONS
    )
    with serving(arguments, {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, port, log) as url:
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def content_of(row):
    with open(row["image"], "rb") as file:
        url = "data:image/jpeg;base64," + base64.b64encode(file.read()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]


def ask(client, content, extra=None, **options):
    body = {"ignore_eos": True, "skip_special_tokens": False, **(extra or {})}
    return client.chat.completions.create(
        model="mini",
        messages=[{"role": "user", "content": content}],
        extra_body=body,
        **{"temperature": 0, "max_tokens": TOKENS, **options},
    )


@pytest.fixture(scope="module")
def answers(model, processor):
    def answers(rows, **options):
        asked = [runs.request(processor, row["question"], [row["image"]], TOKENS) for row in rows]
        return [processor.tokenizer.decode(ids) for ids in runs.reference(model, processor, asked, **options)]

    return answers


def test_two_ranks_give_the_answers_of_transformers_to_many_at_once(client, answers):
    """Each rank sees half of the heads, and both choose from all of them."""
    rows = [row for layout in ("2x2", "1x1", "1x2") for row in runs.rows_of(layout)[:3]]
    with ThreadPoolExecutor(len(rows)) as pool:
        given = list(pool.map(lambda row: ask(client, content_of(row)).choices[0].message.content, rows))
    assert given == answers(rows, keep=KEEP)


def test_streaming(client, answers):
    (row,) = rows = runs.rows_of("2x2")[:1]
    chunks = ask(client, content_of(row), stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert ["".join(pieces)] == answers(rows, keep=KEEP)
    assert sum(map(bool, pieces)) > 1  # piece by piece


def test_stop_strings(client, answers):
    (row,) = rows = runs.rows_of("2x2")[:1]
    (whole,) = answers(rows, keep=KEEP)
    stop = whole[5:7]
    choice = ask(client, content_of(row), stop=[stop]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_seed_repeats_a_sample(client):
    row = runs.rows_of("2x2")[1]

    def sample(seed):
        return ask(client, content_of(row), temperature=2.0, seed=seed, max_tokens=40).choices[0].message.content

    assert sample(1) == sample(1) != sample(2)


def test_a_budget_of_its_own(client, answers):
    (row,) = rows = runs.rows_of("2x2")[2:3]
    for keep in (40, None):
        given = ask(client, content_of(row), {"mm_processor_kwargs": {"crosstrim": {"keep": keep}}})
        assert [given.choices[0].message.content] == answers(rows, keep=keep)


def test_the_client_of_the_docs(client, capsys):
    line, code = pages.snippets("docs/vllm.md")[1]
    code = code.replace("http://127.0.0.1:8000/v1", str(client.base_url))
    names = {"__name__": "__main__"}
    exec(compile("\n" * (line - 1) + code, pages.ROOT / "docs/vllm.md", "exec"), names)
    assert any(answer in capsys.readouterr().out for answer in names["example"]["questions"][0]["answers"])


def test_text_alone(client, model, processor):
    request = runs.request(processor, "What colour is the 2?", [], TOKENS)
    (wanted,) = runs.reference(model, processor, [request])
    assert ask(client, "What colour is the 2?").choices[0].message.content == processor.tokenizer.decode(wanted)


def test_bad_requests_are_refused_and_the_server_goes_on(client, answers):
    (row,) = rows = runs.rows_of("2x2")[:1]
    image, text = content_of(row)
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    for content, extra in [
        ([broken, text], {}),
        ([image] * 3 + [text], {}),
        ([image, text, image], {}),
        ([image, {"type": "text", "text": "two " * 600}], {}),
        ([image, text], {"mm_processor_kwargs": {"crosstrim": {"keep": 7.5}}}),
        ([image, text], {"mm_processor_kwargs": {"crosstrim": {"k": 0.5}}}),
    ]:
        with pytest.raises(openai.BadRequestError):
            ask(client, content, extra)
    assert [ask(client, content_of(row)).choices[0].message.content] == answers(rows, keep=KEEP)
