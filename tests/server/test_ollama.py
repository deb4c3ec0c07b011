"""Ollama's API, as its own client sees it: the answers are those of OpenAI's route."""

from __future__ import annotations

import base64
import io
import json
import threading

import httpx2 as httpx
import ollama
import pytest
from PIL import Image

import crosstrim
from crosstrim.server import gate, generation
from tests.server.conftest import LONG, MODEL, asking, png, until
from tests.support.docs import pages

CHAT, GENERATE = "/api/chat", "/api/generate"
BOTH = pytest.mark.parametrize("path", [CHAT, GENERATE])


def client(server, **options):
    """Ollama's own client."""
    return ollama.Client(server.url, **options)


def b64(content):
    return base64.b64encode(content).decode()


def question(path, text, *files, **more):
    """The body of one question about pictures."""
    said = {"images": [b64(file) for file in files]} if files else {}
    if path == CHAT:
        return {"model": MODEL, "messages": [{"role": "user", "content": text, **said}], **more}
    return {"model": MODEL, "prompt": text, **said, **more}


def text_of(answer):
    return answer["message"]["content"] if "message" in answer else answer["response"]


def chat(server, text, *files, **options):
    """A whole answer of /api/chat."""
    return client(server).chat(
        MODEL, [{"role": "user", "content": text, "images": files}], options={"num_predict": 6, **options}
    )


def test_answers_are_those_of_openai_s_route(server):
    openai = server.ask("what is it?", png(1, tiles=2))
    whole = chat(server, "what is it?", png(1, tiles=2))
    assert whole.message.content == openai.choices[0].message.content
    assert (whole.model, whole.done, whole.done_reason) == (MODEL, True, "length")
    assert (whole.prompt_eval_count, whole.eval_count) == (openai.usage.prompt_tokens, 6)
    generated = client(server).generate(
        MODEL, "what is it?", images=[png(1, tiles=2)], options={"num_predict": 6}, keep_alive="5m"
    )
    assert generated.response == whole.message.content
    assert generated.eval_count == 6


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"crosstrim": {"keep": 9}}, {"extra_body": {"crosstrim": {"keep": 9}}}),
        ({"crosstrim": {"lossless": True}}, {"extra_body": {"crosstrim": {"lossless": True}}}),
        ({"temperature": 1.5, "seed": 3, "top_p": 0.9}, {"temperature": 1.5, "seed": 3, "top_p": 0.9}),
        ({"stop": ["e", "a"], "num_ctx": 4096, "num_gpu": 1}, {"stop": ["e", "a"]}),
    ],
    ids=["keep", "lossless", "sampled", "stop"],
)
def test_options_mean_what_they_mean_on_openai_s_route(server, ours, theirs):
    openai = server.ask("what is it?", png(3), max_tokens=20, **theirs)
    body = question(CHAT, "what is it?", png(3), options={"num_predict": 20, **ours}, stream=False)
    answer = httpx.post(server.url + CHAT, json=body).json()
    assert text_of(answer) == openai.choices[0].message.content
    assert answer["crosstrim"] == openai.usage.crosstrim
    assert answer["done_reason"] == openai.choices[0].finish_reason


@BOTH
def test_a_stream_is_the_default_and_its_lines_are_the_answer(server, path):
    body = question(path, "what is it?", png(3), options={"num_predict": 30})
    whole = httpx.post(server.url + path, json={**body, "stream": False}).json()
    reply = httpx.post(server.url + path, json=body)
    assert reply.headers["content-type"].partition(";")[0] == "application/x-ndjson"
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert "".join(map(text_of, lines)) == text_of(whole)
    assert len(lines) > 5
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert all("eval_count" not in line for line in lines[:-1])
    last = lines[-1]
    assert (text_of(last), last["done_reason"], last["eval_count"]) == ("", "length", 30)
    assert last["crosstrim"] == whole["crosstrim"]
    durations = [last[f"{name}_duration"] for name in ("total", "load", "prompt_eval", "eval")]
    assert all(type(one) is int for one in durations)
    total, load, prompt, answer = durations
    assert load == 0
    assert min(prompt, answer) > 1000  # nanoseconds: no pass of a model takes less
    assert prompt + answer <= total


def test_the_client_s_stream_is_its_whole_answer(server):
    options = {"num_predict": 30}
    messages = [{"role": "system", "content": "be brief."}, {"role": "user", "content": "what?", "images": [png(4)]}]
    whole = client(server).chat(MODEL, messages, options=options)
    pieces = list(client(server).chat(MODEL, messages, options=options, stream=True))
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    written = client(server).generate(MODEL, "what?", system="be brief.", images=[png(4)], options=options)
    pieces = list(
        client(server).generate(MODEL, "what?", system="be brief.", images=[png(4)], options=options, stream=True)
    )
    assert "".join(piece.response for piece in pieces) == written.response == whole.message.content


def test_a_conversation_goes_on(server):
    turns = [{"role": "user", "content": "what is it?", "images": [png(1)]}]
    first = client(server).chat(MODEL, turns, options={"num_predict": 4})
    turns += [first.message, {"role": "user", "content": "why?"}]
    later = client(server).chat(MODEL, turns, options={"num_predict": 4})
    said = [*asking("what is it?", png(1)), {"role": "assistant", "content": first.message.content}]
    same = server.client().chat.completions.create(
        model=MODEL, messages=[*said, {"role": "user", "content": "why?"}], max_tokens=4
    )
    assert later.message.content == same.choices[0].message.content
    assert later.prompt_eval_count == same.usage.prompt_tokens


def test_an_answer_of_any_length_is_as_long_as_the_model_reads(start):
    with start(max_new_tokens=20) as server:
        for count in (-1, -2, 0):
            assert chat(server, "what is it?", png(1), num_predict=count).eval_count == 20
        near = chat(server, "a" * 470, num_predict=-1)  # of 512 tokens
        assert 1 <= near.eval_count < 20
        assert near.prompt_eval_count + near.eval_count == 512
        with pytest.raises(ollama.ResponseError, match=r"options\.num_predict=21 is more than this server gives, 20"):
            chat(server, "what is it?", num_predict=21)


def test_a_model_s_name_may_bear_the_tag(server):
    assert chat(server, "what?", png(1)).model == MODEL
    tagged = client(server).chat(
        f"{MODEL}:latest", [{"role": "user", "content": "what?"}], options={"num_predict": 1}
    )
    assert tagged.model == f"{MODEL}:latest"
    for name in ("other", f"{MODEL}:11b", f"{MODEL}:latest:latest"):
        with pytest.raises(ollama.ResponseError, match=f"there is no model '{name}' here, only 'tiny:latest'") as no:
            client(server).generate(name, "what?")
        assert no.value.status_code == 404


def test_what_is_told_of_the_model(server, loaded):
    model, processor = loaded
    asker = client(server)
    (listed,) = asker.list().models
    (running,) = asker.ps().models
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    for entry in (listed, running):
        assert (entry.model, entry.size, len(entry.digest)) == (f"{MODEL}:latest", size, 64)
        assert (entry.details.family, entry.details.format) == ("mllama", "safetensors")
    assert (running.size_vram, running.context_length) == (0, 512)
    assert running.expires_at.year == 9999
    for name in (MODEL, f"{MODEL}:latest"):
        shown = asker.show(name)
        assert shown.capabilities == ["completion", "vision"]
        assert shown.modelinfo["general.architecture"] == "mllama"
        assert shown.modelinfo["general.parameter_count"] == model.num_parameters()
        assert shown.modelinfo["mllama.context_length"] == 512
        assert shown.template == processor.chat_template
    told = httpx.post(f"{server.url}/api/show", json={"name": MODEL}).json()
    assert (told["crosstrim"]["k"], told["details"]["parameter_size"][-1]) == (0.25, "M")
    assert httpx.get(f"{server.url}/api/version").json() == {"version": crosstrim.__version__}
    with pytest.raises(ollama.ResponseError, match="there is no model 'other' here"):
        asker.show("other")
    assert httpx.get(server.url).text == "crosstrim is running"
    assert httpx.head(server.url).status_code == 200


def test_who_asks_nothing_learns_that_the_model_is_loaded(server):
    for path, more in [(CHAT, {}), (CHAT, {"messages": []}), (GENERATE, {}), (GENERATE, {"keep_alive": 0})]:
        reply = httpx.post(server.url + path, json={"model": MODEL, **more})
        answer = reply.json()  # one object, also of a stream
        assert (answer["done"], answer["done_reason"], text_of(answer)) == (True, "load", "")
    assert httpx.post(server.url + CHAT, json={"model": "other"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (question(CHAT, "a?", options={"top_k": 40}), "this server does not support options.top_k=40; leave it out."),
        (question(GENERATE, "a?", options={"repeat_penalty": 1.1}), "does not support options.repeat_penalty=1.1"),
        (
            question(CHAT, "a?", options={"nonsense": 1}),
            "this server does not support options.nonsense; leave it out",
        ),
        (question(CHAT, "a?", options={"temperature": 3}), "options.temperature must be less than or equal to 2"),
        (question(CHAT, "a?", options={"num_predict": "6"}), "options.num_predict must be a valid integer, got '6'."),
        (
            question(CHAT, "a?", options={"num_predict": -3}),
            "options.num_predict must be greater than or equal to -2",
        ),
        (question(CHAT, "a?", options={"crosstrim": {"k": 0.5, "keep": 9}}), "give one of them"),
        (
            question(CHAT, "a?", options={"crosstrim": {"kk": 1}}),
            "does not support options.crosstrim.kk; leave it out",
        ),
        (question(CHAT, "a?", options={"stop": ["a"] * 17}), "options.stop must have at most 16 items"),
        (question(CHAT, "a?", options=5), "options must be an object, got 5."),
        (question(CHAT, "a?", options={"num_predict": 511}), "Shorten the prompt, or lower options.num_predict."),
        (
            question(CHAT, "a?", tools=[{"type": "function"}]),
            "does not support tools=[{'type': 'function'}]; leave it",
        ),
        (question(CHAT, "a?", think="high"), "this server does not support think='high'; leave it out."),
        (question(GENERATE, "a?", suffix="b"), "this server does not support suffix='b'; leave it out."),
        (question(GENERATE, "a?", context=[1, 2]), "this server does not support context=[1, 2]; leave it out."),
        (question(GENERATE, "a?", raw=True), "this server does not support raw=True; leave it out."),
        (question(CHAT, "a?", png()[:-30]), "damaged"),
        (question(GENERATE, "a?", b"nothing"), "is no picture"),
        (question(GENERATE, "a?", *[png()] * 9), "has 9 pictures; the limit is 8"),
        ({"model": MODEL, "prompt": "a?", "images": ["?"]}, "no valid base64"),
        ({"model": MODEL, "prompt": "a?", "images": ["https://pictures.example/a.png"]}, "no valid base64"),
        ({"model": MODEL, "prompt": " "}, "question is empty"),
        (
            {"model": MODEL, "messages": [{"role": "tool", "content": "a"}]},
            "messages.0.role must be 'system', 'user'",
        ),
        ({"model": MODEL, "messages": [{"role": "system", "content": "", "images": ["AA"]}]}, "only a user's may"),
        ({"prompt": "a?"}, "model is missing."),
        (question(CHAT, "a?" * 5_000), "bytes; the limit is 8192"),
    ],
)
def test_bad_requests_are_told_what_is_wrong_in_ollama_s_shape(server, body, words):
    path = CHAT if "messages" in body else GENERATE
    for stream in (False, True):
        reply = httpx.post(server.url + path, json={**body, "stream": stream})
        assert reply.status_code == 400, reply.text
        assert list(reply.json()) == ["error"]
        assert words in reply.json()["error"]


def test_fields_that_ask_for_nothing_are_accepted(server):
    plain = question(GENERATE, "hello?", options={"num_predict": 2}, stream=False)
    nothing = {"suffix": "", "template": "", "system": "", "context": [], "raw": False, "think": False, "format": ""}
    options = {
        "top_k": 0,
        "repeat_penalty": 1.0,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "num_thread": 4,
        "use_mmap": True,
    }
    more = {**plain, **nothing, "images": [], "keep_alive": -1, "options": {**plain["options"], **options}}
    answers = [httpx.post(server.url + GENERATE, json=body).json() for body in (plain, more)]
    assert answers[0]["response"] == answers[1]["response"]
    echoed = question(CHAT, "hello?", options={"num_predict": 2}, stream=False, tools=[])
    echoed["messages"][0] |= {"thinking": "", "tool_calls": [], "tool_name": None, "images": None}
    assert httpx.post(server.url + CHAT, json=echoed).json()["message"]["content"] == answers[0]["response"]


def test_bodies_need_no_content_type_unless_a_browser_sends_them(server):
    body = json.dumps(question(GENERATE, "hello?", options={"num_predict": 1}, stream=False)).encode()
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # curl's
    assert httpx.post(server.url + GENERATE, content=body, headers=form).json()["done"]
    assert httpx.post(server.url + GENERATE, content=body).json()["done"]
    for headers in ({**form, "Origin": "https://evil.example"}, {"Origin": "https://evil.example"}):
        refused = httpx.post(server.url + GENERATE, content=body, headers=headers)
        assert (refused.status_code, "must be a JSON object" in refused.json()["error"]) == (400, True)


@BOTH
def test_a_client_s_limits_are_those_of_openai_s_route(start, path):
    body = question(path, "what?", png(), options={"num_predict": LONG})
    with start(queue_limit=1, api_keys=("right",), max_image_bytes=5_000) as server:
        url, key = server.url + path, {"Authorization": "Bearer right"}
        for wrong in ({}, {"Authorization": "Bearer wrong"}):
            reply = httpx.post(url, json=body, headers=wrong)
            assert (reply.status_code, reply.json()) == (401, {"error": "the API key is missing or wrong."})
        with httpx.stream("POST", url, json=body, headers=key, timeout=30) as running:
            lines = running.iter_lines()  # held, as the response ends with it
            assert not json.loads(next(lines))["done"]
            full = httpx.post(url, json=body, headers=key, timeout=30)
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            assert "which is the limit" in full.json()["error"]
            page = httpx.get(f"{server.url}/metrics", headers=key).text
            assert "crosstrim_unfinished_requests 1.0" in page
        until(lambda: server.service.unfinished == 0)
        large = httpx.post(url, content=b"x" * (server.service._settings.max_body_bytes + 1), headers=key)
        assert (large.status_code, "which is the limit" in large.json()["error"]) == (413, True)
        picture = httpx.post(url, json=question(path, "what?", b"x" * 5_001), headers=key)
        assert (picture.status_code, "the limit is 5000" in picture.json()["error"]) == (400, True)
        server.service.draining = True
        late = httpx.post(url, json=body, headers=key)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert late.json() == {"error": "the server is going down; try again later."}
        assert httpx.get(f"{server.url}/api/version").status_code == 401
        answered_ones = 'crosstrim_requests_total{status="200"} 1.0'
        server.service.draining = False
        assert answered_ones in httpx.get(f"{server.url}/metrics", headers=key).text


@BOTH
def test_time_and_failures_end_an_answer_as_on_openai_s_route(start, monkeypatch, path):
    body = question(path, "what?", png(), options={"num_predict": LONG})
    with start(timeout=0.4) as server:
        late = httpx.post(server.url + path, json={**body, "stream": False}, timeout=30)
        assert (late.status_code, "longer than this server allows" in late.json()["error"]) == (504, True)
        last = json.loads(httpx.post(server.url + path, json=body, timeout=30).text.splitlines()[-1])
        assert list(last) == ["error"]
        until(lambda: server.service.unfinished == 0)
    with start() as server:
        monkeypatch.setattr(generation.Generator, "_generate", lambda *_: 1 / 0)
        for stream in (False, True):
            failed = httpx.post(server.url + path, json={**body, "stream": stream})
            assert failed.status_code == 500
            assert failed.json() == {"error": "the server failed on this request; its log says why."}
        monkeypatch.setattr(server.service, "prepare", lambda *_: (_ for _ in ()).throw(MemoryError))
        failed = httpx.post(server.url + path, json=body)
        assert (failed.status_code, list(failed.json())) == (500, ["error"])
        assert failed.headers["x-request-id"]


def test_an_error_within_a_stream_is_raised_by_the_client(start):
    with start(timeout=0.4) as server, pytest.raises(ollama.ResponseError, match="longer than this server allows"):
        list(
            client(server).chat(
                MODEL, [{"role": "user", "content": "a?"}], options={"num_predict": LONG}, stream=True
            )
        )


@BOTH
def test_a_client_that_leaves_frees_its_row(start, monkeypatch, path):
    steps, ended = [], threading.Event()
    add, answer = generation._Row.add, generation.Generator.answer
    monkeypatch.setattr(generation._Row, "add", lambda self, *given: steps.append(given) or add(self, *given))
    monkeypatch.setattr(generation.Generator, "answer", lambda self, chats: (answer(self, chats), ended.set()))
    with start() as server:
        body = question(path, "what?", png(), options={"num_predict": LONG})
        with httpx.stream("POST", server.url + path, json=body, timeout=30) as reply:
            next(reply.iter_lines())
        assert ended.wait(20)
        assert len(steps) < LONG


@BOTH
def test_a_body_that_stays_away_is_left(start, monkeypatch, path):
    monkeypatch.setattr(gate, "SILENT_SECONDS", 0.3)
    with start() as server:
        held = threading.Event()

        def begun():
            yield b"{"
            held.wait(1.5)

        reply = httpx.post(server.url + path, content=begun())
        assert (reply.status_code, reply.json()) == (408, {"error": "the request's body did not arrive in time."})


def test_bodies_that_need_no_place_in_the_queue_are_small(server):
    def endless():
        for _ in range(100):
            yield b" " * 1000

    url = f"{server.url}/api/show"
    for content in (b" " * 70_000, endless()):
        reply = httpx.post(url, content=content)
        assert (reply.status_code, "larger than 65536 bytes" in reply.json()["error"]) == (413, True)
    assert httpx.post(url, json={"model": MODEL, "verbose": True}).status_code == 200


def test_unknown_paths_and_methods_have_the_shape_too(server):
    for method, path, status in [("GET", "/api/nothing", 404), ("GET", CHAT, 405), ("POST", CHAT, 400)]:
        reply = httpx.request(method, server.url + path)
        assert (reply.status_code, list(reply.json())) == (status, ["error"])


def test_the_client_in_the_docs_runs_when_pasted(start, tmp_path, monkeypatch, capsys):
    ((_, code),) = pages.snippets("docs/ollama.md")
    Image.open(io.BytesIO(png(2))).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    with start(model="meta-llama/Llama-3.2-11B-Vision-Instruct", name="llama3.2-vision") as server:
        exec(code.replace("http://127.0.0.1:11434", server.url), {})
    assert capsys.readouterr().out.strip()
