"""What a request may cost before it is refused."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest
from starlette.exceptions import HTTPException

from crosstrim.server import body, generation, pictures, prompts
from crosstrim.server.asked import Turn
from crosstrim.server.body import parse
from crosstrim.server.pixels import Pixels
from crosstrim.server.settings import BESIDE_PICTURES
from tests.server.conftest import MODEL, asking, data_uri, png, until


def request(**fields):
    return {"model": MODEL, "messages": asking('a "quoted" \\ [text], {b}', png()), "max_tokens": 2, **fields}


@pytest.mark.parametrize("escaped", [True, False])
def test_what_is_within_the_limits_is_parsed_as_json_does(escaped):
    deep = "x"
    for _ in range(body.MAX_DEPTH - 1):
        deep = [deep]
    whole = request(
        metadata={"deep": deep[0], "quotes": '"\\"' * 50_000, "comma": "," * 100_000, "é": "\u2028\U0001f600"}
    )
    whole["messages"].append({"role": "user", "content": "see ;base64, and [[[[" + "[" * 50_000})
    assert parse(json.dumps(whole, ensure_ascii=escaped).encode()) == whole


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b'{"metadata": {"a": [' + b"[]," * 30_000 + b"1]}}", 400, "the limit is 20000. Send fewer"),
        (b'{"metadata": {"a": [' + b'"b",' * 300_000 + b"1]}}", 400, "texts and names; the limit is 40000"),
        (b'{"metadata": {"a": ";base64,", "b": [' + b"[]," * 30_000 + b"1]}}", 400, "the limit is 20000"),
        (b'{"metadata": {"a": "\\\\", "b": [' + b"[]," * 30_000 + b"1]}}", 400, "the limit is 20000"),
        (b'{"metadata": {"a": ";base64,\\"", "b": [' + b"[]," * 30_000 + b"1]}}", 400, "the limit is 20000"),
        (b'{"images": ["\\"", [' + b"[]," * 30_000 + b"1]]}", 400, "the limit is 20000"),
        (b'{"images": ["AA", "\\"", "AA", [' + b"[]," * 30_000 + b"1]]}", 400, "the limit is 20000"),
        (b'{"images": [' + b'"AA",' * 50_000 + b"1]}", 400, "texts and names; the limit is 40000"),
        (b'{"metadata": {"a": ' + b"[" * 100 + b"]" * 100 + b"}}", 400, "more than 32 deep"),
        (b'{"metadata": "' + b"a" * BESIDE_PICTURES + b'"}', 413, f"the limit is {BESIDE_PICTURES}"),
        (b'{"seed": ' + b"1" * 5_000 + b"}", 400, "a number that cannot be read"),
        (b'{"temperature": NaN}', 400, "NaN is no JSON"),
        (b'{"user": "\xff"}', 400, "no UTF-8"),
        ('{"user": "a"}'.encode("utf-16"), 400, "no UTF-8"),
    ],
    ids=[
        "values",
        "texts",
        "hidden",
        "backslash",
        "quote",
        "image",
        "images",
        "many",
        "depth",
        "size",
        "digits",
        "nan",
        "bytes",
        "utf-16",
    ],
)
def test_costly_bodies_are_refused_before_they_are_parsed(server, monkeypatch, content, status, words):
    with pytest.raises(HTTPException) as refused:
        parse(content)
    assert refused.value.status_code == status
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=30)
    assert (reply.status_code, words in reply.json()["error"]["message"]) == (status, True), reply.text


def test_pictures_do_not_count_as_text():
    large = data_uri(b"x?>" * BESIDE_PICTURES)
    bare = large.partition(",")[2]
    for whole in (
        {"a": [large, large]},
        {"images": [bare, bare]},
        {"messages": [{"images": [bare]}, {"images": [bare]}]},
    ):
        for indent in (None, 1):
            assert parse(json.dumps(whole, indent=indent).encode()) == whole
        assert parse(json.dumps(whole).replace("/", "\\/").encode()) == whole
    with pytest.raises(HTTPException):
        parse(json.dumps({"image": [bare]}).encode())


def test_bodies_are_parsed_beside_the_event_loop(server, monkeypatch):
    loops = []
    monkeypatch.setattr(body, "parse", lambda content: loops.append(asyncio._get_running_loop()) or parse(content))
    assert httpx.post(f"{server.url}/v1/chat/completions", json=request(), timeout=30).status_code == 200
    assert loops == [None]


@pytest.mark.parametrize(
    ("stop", "words"),
    [(["a"] * 17, "stop must have at most 16 items"), ("a" * 257, "at most 256 char"), (["a" * 257], "stop.0")],
    ids=["count", "length", "one-s-length"],
)
def test_stop_strings_are_bounded(server, stop, words):
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=request(stop=stop))
    assert (reply.status_code, words in reply.json()["error"]["message"]) == (400, True), reply.text


def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(server):
    for text in ("a b " * 400, "a" * 9_000):
        with pytest.raises(openai.BadRequestError, match="model reads") as refused:
            server.ask(text)
        assert refused.value.code == "context_length_exceeded"
        assert refused.value.param == "messages"


def test_a_long_text_is_not_tokenized_and_no_prompt_by_the_model_s_thread_first(loaded):
    _, processor = loaded
    asked = prompts.Prompts(processor, 512)
    tokenized = []

    class Backend:
        def encode_batch(self, texts, **options):
            tokenized.append(texts)
            return real.encode_batch(texts, **options)

    real = asked._tokenizer.backend_tokenizer
    asked._tokenizer = type("Tokenizer", (), {"backend_tokenizer": Backend()})()
    message = Turn("user", ("a" * (512 * prompts.BYTES_PER_TOKEN + 1),))
    with pytest.raises(prompts.ContextLengthError, match="8193 bytes; the limit is 8192, 16 for each of the 512"):
        asked.write([message], 1)
    assert tokenized == []
    written = asked.write([Turn("user", ("what?",))], 1)
    assert tokenized == [[written.prompt]]


def test_the_count_is_the_tokenizer_s_own(loaded):
    _, processor = loaded
    message = Turn("user", ("what is it, é?",))
    prompt = prompts.Prompts(processor, 512).write([message], 1).prompt
    length = len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    prompts.Prompts(processor, length + 1).write([message], 1)
    with pytest.raises(prompts.ContextLengthError, match=f"has {length} tokens .* reads {length};|{length}"):
        prompts.Prompts(processor, length).write([message], 1)


def test_an_image_token_of_two_parts_is_refused(server):
    parts = [{"type": "text", "text": "<|ima"}, {"type": "text", "text": "ge|> what?"}]
    for more in ([], asking("", png())[0]["content"][:1]):
        whole = request(messages=[{"role": "user", "content": [*more, *parts]}])
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=whole)
        assert (reply.status_code, "which stands for a picture" in reply.text) == (400, True), reply.text


def test_pixels_are_taken_in_turn_and_given_back_with_the_last_reference():
    pixels = Pixels(100)
    first, second = pixels.take(60), pixels.take(40)
    with pytest.raises(TimeoutError):
        pixels.take(1, time.monotonic() - 1)
    taken, begun = [], threading.Event()

    def take(count):
        begun.set()
        taken.append(pixels.take(count, time.monotonic() + 20))

    large = threading.Thread(target=take, args=(50,))
    large.start()
    assert begun.wait(20)
    until(lambda: pixels.waiting == 1)
    small = threading.Thread(target=take, args=(10,))
    small.start()
    until(lambda: pixels.waiting == 2)
    del second  # 40 are free: enough for the small one, whose turn it is not
    time.sleep(0.05)
    assert taken == []
    del first
    large.join(20)
    small.join(20)
    assert pixels.in_use == 60
    taken.clear()
    assert pixels.in_use == 0
    assert pixels.take(100)


def test_who_gives_up_waiting_lets_the_next_one_pass():
    pixels = Pixels(100)
    held = pixels.take(80)
    with pytest.raises(TimeoutError):
        pixels.take(50, time.monotonic() + 0.05)
    assert pixels.take(20, time.monotonic() + 20)
    assert held


def test_decoded_pictures_are_bounded_by_their_pixels(start, monkeypatch):
    decoded, may = [], threading.Event()
    as_rgb = pictures.as_rgb
    monkeypatch.setattr(pictures, "as_rgb", lambda *given: decoded.append(given[0].size) or as_rgb(*given))
    generate = generation.Generator._generate
    monkeypatch.setattr(
        generation.Generator, "_generate", lambda *given: generate(*given) if may.wait(20) else pytest.fail("late")
    )
    with start(max_pixels=28 * 28 * 2, max_wait_ms=0) as server:
        budget = server.service.pixels
        assert budget.limit == 28 * 28 * 4
        with ThreadPoolExecutor(6) as askers:
            asked = [askers.submit(server.ask, "what?", png(seed), png(seed + 10)) for seed in range(6)]
            until(lambda: budget.waiting == 4)
            assert len(decoded) == 4
            assert budget.in_use == budget.limit
            may.set()
            assert all(one.result().choices for one in asked)
        assert len(decoded) == 12
        until(lambda: budget.in_use == 0)


@pytest.mark.parametrize("ends", ["damaged", "fails", "leaves"])
def test_pixels_come_back_however_a_request_ends(start, monkeypatch, ends):
    may = threading.Event()
    with start() as server:
        if ends == "damaged":
            with pytest.raises(openai.BadRequestError, match="damaged"):
                server.ask("what?", png(1), png(2)[:-30])
        elif ends == "fails":
            monkeypatch.setattr(generation.Encoder, "inputs", lambda *_, **__: 1 / 0)
            with pytest.raises(openai.InternalServerError):
                server.ask("what?", png())
        else:
            monkeypatch.setattr(generation.Generator, "_generate", lambda *_: may.wait(20))
            client = server.client().with_options(timeout=0.5)
            for _ in range(2):  # the model has one of them, the other waits for it
                with pytest.raises(openai.APITimeoutError):
                    client.chat.completions.create(model=MODEL, messages=asking("what?", png()))
            until(lambda: server.service.pixels.in_use == 28 * 28)
            may.set()
        until(lambda: server.service.pixels.in_use == 0)
