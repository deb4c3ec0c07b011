"""The server's answers, as OpenAI's own client sees them."""

from __future__ import annotations

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from PIL import Image

from crosstrim import TrimConfig
from crosstrim.errors import ConfigError
from crosstrim.server.settings import Settings
from tests.server.conftest import MODEL, asking, expected, png, until
from tests.support.docs import pages


def test_an_answer_is_that_of_ask(server, loaded):
    reply = server.ask("what is it?", png(1, tiles=2))
    alone = expected(loaded, "what is it?", png(1, tiles=2))
    assert reply.choices[0].message.content == alone.answer
    assert (reply.choices[0].finish_reason, reply.model, reply.object) == ("length", MODEL, "chat.completion")
    assert reply.usage.crosstrim == {"visible": alone.report.visible, "kept": alone.report.kept}
    assert (reply.usage.completion_tokens, reply.usage.total_tokens - reply.usage.prompt_tokens) == (6, 6)


@pytest.mark.parametrize(
    ("wanted", "config"),
    [
        ({"k": 0.5}, TrimConfig(k=0.5)),
        ({"keep": 9}, TrimConfig(keep=9)),
        ({"keep": 0.3, "policy": "mean"}, TrimConfig(keep=0.3, policy="mean")),
        ({"lossless": True}, TrimConfig()),
    ],
)
def test_a_request_may_bring_its_own_trim(server, loaded, wanted, config):
    reply = server.ask("what is it?", png(2), extra_body={"crosstrim": wanted})
    alone = expected(loaded, "what is it?", png(2), config)
    assert reply.choices[0].message.content == alone.answer
    assert reply.usage.crosstrim == {"visible": alone.report.visible, "kept": alone.report.kept}


def test_a_stream_s_pieces_are_the_answer(server):
    whole = server.ask("what is it?", png(3), max_tokens=30)
    pieces = list(
        server.ask("what is it?", png(3), max_tokens=30, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == whole.choices[0].message.content
    assert sum(bool(piece.choices[0].delta.content) for piece in pieces[:-1]) > 5
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage == whole.usage
    assert len({piece.id for piece in pieces}) == 1
    assert all("usage" in piece.model_fields_set and piece.usage is None for piece in pieces[:-1])
    assert all("usage" not in piece.model_fields_set for piece in server.ask("a?", max_tokens=2, stream=True))


def test_who_does_not_say_how_much_gets_no_more_than_the_server_gives(start):
    with start(max_new_tokens=5) as server:
        reply = server.ask("what is it?", png(3), max_tokens=None)
        assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (5, "length")
        with pytest.raises(openai.BadRequestError, match="max_tokens=6 is more than this server gives, 5; ask for"):
            server.ask("what is it?", png(3), max_tokens=6)


def test_stop_strings(server):
    whole = server.ask("what is it?", png(3), max_tokens=30).choices[0].message.content
    stop = whole[7:9]
    for options in ({"stop": stop}, {"stop": ["never this", stop]}):
        reply = server.ask("what is it?", png(3), max_tokens=30, **options)
        assert reply.choices[0].message.content == whole[: whole.find(stop)].strip()
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.completion_tokens < 30
        pieces = server.ask("what is it?", png(3), max_tokens=30, stream=True, **options)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert streamed == reply.choices[0].message.content


def test_a_sampled_answer_depends_on_its_seed_and_on_nothing_else(start):
    def draw(seed, picture=4, **options):
        options = {"temperature": 1.5, "max_tokens": 20, **options}
        return server.ask("what is it?", png(picture), seed=seed, **options).choices[0].message.content

    with start() as server:
        first, cut = draw(1), draw(1, top_p=0.4)
        greedy = draw(None, temperature=0)
        assert draw(3, top_p=1e-9) == greedy
        assert len({draw(seed) for seed in range(2, 6)} | {first}) > 1
        assert len({draw(None) for _ in range(6)}) > 1
    with start(max_batch=4, max_wait_ms=500) as server:
        together = [((1,), {}), ((1,), {"top_p": 0.4}), ((None,), {"temperature": 0}), ((7, 5), {"max_tokens": 30})]
        with ThreadPoolExecutor(4) as others:
            answers = [other.result() for other in [others.submit(draw, *args, **more) for args, more in together]]
        assert answers[:3] == [first, cut, greedy]
        page = httpx.get(f"{server.url}/metrics").text
        sizes = {bound: float(count) for bound, count in re.findall(r'batch_size_bucket{le="(.*)"} (.*)', page)}
        assert sizes["4.0"] - sizes["2.0"] == 1


def test_text_alone_several_pictures_and_earlier_turns(server):
    text = server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello?"}], max_completion_tokens=4
    )
    assert text.usage.crosstrim == {"visible": 0, "kept": 0}
    assert text.usage.completion_tokens == 4
    two = server.ask("and these?", png(1), png(2, tiles=2), extra_body={"crosstrim": {"lossless": True}})
    assert two.usage.crosstrim == {"visible": 51, "kept": 51}
    turns = [{"role": "system", "content": "be brief."}, *asking("what is it?", png(1))]
    turns += [{"role": "assistant", "content": "a 3"}, {"role": "user", "content": "why?"}]
    later = server.client().chat.completions.create(model=MODEL, messages=turns, max_tokens=4)
    assert later.usage.prompt_tokens > server.ask("what is it?", png(1)).usage.prompt_tokens


def test_a_picture_asked_about_again_is_not_encoded_again(start, loaded, monkeypatch):
    from crosstrim.models import vision

    encoded = []
    encode = vision.encode
    monkeypatch.setattr(
        vision, "encode", lambda model, inputs: encoded.append(len(inputs["pixel_values"])) or encode(model, inputs)
    )
    per_picture = 4 * 17 * 64 * 4
    with start(feature_cache_bytes=2 * per_picture) as server:
        files = [png(seed) for seed in range(3)]
        for which in (0, 0, 1, 0, 2, 0, 1):  # 2 pushes 1 out
            reply = server.ask("what is it?", files[which])
            assert reply.choices[0].message.content == expected(loaded, "what is it?", files[which]).answer
        server.ask("the same twice?", files[1], files[1])
        assert encoded == [1, 1, 1, 1]
        assert server.service._generator.cache.bytes == 2 * per_picture


def test_a_developer_is_the_system(server):
    asked = []
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "be brief."}, {"role": "user", "content": "hello?"}]
        asked.append(server.client().chat.completions.create(model=MODEL, messages=messages, max_tokens=4))
    assert asked[0].usage == asked[1].usage
    assert asked[0].choices == asked[1].choices


def test_a_picture_alone_is_a_question(server):
    picture = asking("", png(1))[0]["content"][:1]
    reply = server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": picture}], max_tokens=2
    )
    assert reply.usage.crosstrim["visible"] == 17


def test_models_and_health(server):
    assert [card.id for card in server.client().models.list()] == [MODEL]
    assert server.client().models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("other")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}
    for path in ("/health", "/ready"):
        reply = httpx.head(f"{server.url}{path}")
        assert (reply.status_code, reply.content) == (200, b"")


def test_where_a_model_s_folder_lies_is_not_told(start, checkpoint):
    folder = str(checkpoint)
    with start(model=folder) as server:
        (card,) = server.client().models.list()
        assert card.id == checkpoint.name
        assert server.client().models.retrieve(card.id) == card
        for name in (card.id, folder):
            reply = server.client().chat.completions.create(model=name, messages=asking("what?"), max_tokens=1)
            assert reply.model == card.id
        with pytest.raises(openai.NotFoundError, match=f"no model 'other' here, only '{card.id}'"):
            server.client().models.retrieve("other")


def test_clients_may_call_the_model_by_a_name(start, checkpoint):
    with start(model=str(checkpoint), name="llama3.2-vision:11b") as server:
        (card,) = server.client().models.list()
        assert card.id == "llama3.2-vision:11b"
        for name in (card.id, str(checkpoint)):
            asked = {"model": name, "messages": asking("what?"), "max_tokens": 1}
            assert server.client().chat.completions.create(**asked).model == card.id
        with pytest.raises(openai.NotFoundError, match=r"no model 'llama3\.2-vision' here"):
            server.client().models.retrieve("llama3.2-vision")
        (entry,) = httpx.get(f"{server.url}/api/tags").json()["models"]
        assert entry["name"] == card.id


def test_browsers_are_let_in_where_they_come_from(start, server):
    page, path = "https://app.example", "/v1/chat/completions"
    before = {
        "Origin": page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-stainless-os",
    }
    body = {"model": MODEL, "messages": asking("what?"), "max_tokens": 1}
    with start(cors_origins=(page, "http://localhost:3000"), api_keys=("right",)) as open_one:
        url = open_one.url + path
        preflight = httpx.options(url, headers=before)  # browsers send no key with it
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, page)
        assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
        for key, status in (("right", 200), ("wrong", 401)):
            reply = httpx.post(url, json=body, headers={"Origin": page, "Authorization": f"Bearer {key}"})
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, page)
            assert "x-request-id" in reply.headers["access-control-expose-headers"].lower()
        other = httpx.options(url, headers={**before, "Origin": "https://evil.example"})
        assert (other.status_code, "access-control-allow-origin" in other.headers) == (400, False)
    for reply in (httpx.options(server.url + path, headers=before), httpx.get(server.url, headers=before)):
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "wrong",
    [{"cors_origins": (origin,)} for origin in ("app.example", "https://app.example/", "https://App.example", "null")]
    + [{"name": name} for name in ("", "a b", "/a", "é", "a" * 129)],
    ids=str,
)
def test_names_and_origins_that_nothing_could_match_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be"):
        Settings(**wrong)


def test_the_client_in_the_docs_runs_when_pasted(start, tmp_path, monkeypatch, capsys):
    ((_, code),) = pages.snippets("docs/serving.md")
    Image.open(io.BytesIO(png(2))).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    with start(model="meta-llama/Llama-3.2-11B-Vision-Instruct", api_keys=("secret",), max_new_tokens=6) as server:
        exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out.strip().endswith("{'visible': 17, 'kept': 4}")


def test_metrics_count(start):
    with start() as server:
        server.ask("what is it?", png(1), extra_body={"crosstrim": {"keep": 9}})
        with pytest.raises(openai.BadRequestError):
            server.ask(" ")
        until(lambda: "unfinished_requests 0.0" in httpx.get(f"{server.url}/metrics").text)
        page = httpx.get(f"{server.url}/metrics").text.splitlines()
    assert {
        'crosstrim_requests_total{status="200"} 1.0',
        'crosstrim_requests_total{status="400"} 1.0',
        "crosstrim_generated_tokens_total 6.0",
        'crosstrim_image_features_total{what="visible"} 17.0',
        'crosstrim_image_features_total{what="kept"} 9.0',
        "crosstrim_unfinished_requests 0.0",
        f"crosstrim_feature_cache_bytes {4 * 17 * 64 * 4:.1f}",
        "crosstrim_time_to_first_token_seconds_count 1.0",
        "crosstrim_decoded_pixels 0.0",
    } <= set(page)
    values = dict(line.rsplit(" ", 1) for line in page if not line.startswith("#"))
    assert (
        0
        < float(values["crosstrim_time_to_first_token_seconds_sum"])
        <= float(values["crosstrim_request_seconds_sum"])
    )
    if Path("/proc/self/stat").exists():
        assert float(values["process_resident_memory_bytes"]) > 1e8
        assert {"process_cpu_seconds_total", "process_open_fds", "process_start_time_seconds"} <= set(values)


def test_the_schema_names_what_is_ours(server):
    schema = json.dumps(httpx.get(f"{server.url}/openapi.json").json())
    assert all(f'"{name}"' in schema for name in ("crosstrim", "lossless", "visible", "text/event-stream"))
