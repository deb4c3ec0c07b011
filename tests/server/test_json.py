"""Answers that meet a JSON schema, and the likelihoods of tokens."""

from __future__ import annotations

import base64
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Literal

import httpx2 as httpx
import jsonschema
import ollama
import openai
import pydantic
import pytest
from PIL import Image

import crosstrim
from crosstrim import TrimConfig, mini
from crosstrim.asking import answering
from crosstrim.errors import InputError
from crosstrim.server import grammar
from crosstrim.server.decoding import TokenTexts
from tests.server.conftest import MODEL, asking, png, until

COLOURS = ["red", "green", "blue", "orange", "pink"]
SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {
            "colour": {"enum": COLOURS},
            "digit": {"type": "integer", "minimum": 0, "maximum": 9},
            "seen": {"type": "boolean"},
        },
        "required": ["colour", "digit", "seen"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 9},
        "minItems": 2,
        "maxItems": 5,
    },
    "pattern": {"type": "string", "pattern": "^[0-9]{4}-[a-z]{3}$"},
    "nested": {
        "$defs": {"place": {"enum": ["top left", "middle", "bottom"]}},
        "type": "object",
        "properties": {
            "at": {"$ref": "#/$defs/place"},
            "more": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 8}]},
        },
        "required": ["at", "more"],
        "additionalProperties": False,
    },
}


def formatted(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def talker(start):
    """A server of mini, whose tokens are bytes as the real model's are."""
    with start(checkpoint="mini") as running:
        yield running


def picture(place=0):
    return Path(mini.examples()[place]["image"]).read_bytes()


def test_every_answer_in_a_batch_meets_its_schema_and_mates_answer_as_ever(talker, monkeypatch):
    """Greedy and sampled, under four schemas and none."""
    asked = [("What colour is the 2?", None, {}), ("Read all the digits.", None, {"temperature": 1.0, "seed": 4})]
    for seed, schema in enumerate(SCHEMAS.values()):
        asked += [("What colour is the 2?", schema, {}), ("Read all.", schema, {"temperature": 1.5, "seed": seed})]

    def ask(question, schema, options):
        wanted = {} if schema is None else {"response_format": formatted(schema)}
        return talker.ask(question, picture(), max_tokens=120, **wanted, **options).choices[0]

    alone = [ask(*asked[0]).message.content, ask(*asked[1]).message.content]
    monkeypatch.setattr(talker.service._scheduler, "_max_wait", 2.0)  # seconds that they wait for each other
    before = batches(talker)
    with ThreadPoolExecutor(len(asked)) as askers:
        answers = list(askers.map(lambda one: ask(*one), asked))
    assert batches(talker) - before <= 3  # of ten: they ran together
    assert [answer.message.content for answer in answers[:2]] == alone
    for (_, schema, _), answer in zip(asked[2:], answers[2:], strict=True):
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.message.content), schema)


def batches(server):
    page = httpx.get(f"{server.url}/metrics").text
    return float(page.partition("crosstrim_batch_size_count ")[2].split()[0])


class Seen(pydantic.BaseModel):
    """What a client's program wants to know."""

    colour: Literal["red", "green", "blue"]
    digit: int = pydantic.Field(ge=0, le=9)
    nothing_else: bool | None


def test_the_clients_own_ways_to_ask_for_a_class(talker):
    messages = asking("What colour is the 2?", picture())
    parsed = talker.client().chat.completions.parse(
        model=MODEL, messages=messages, response_format=Seen, max_tokens=60
    )
    seen = parsed.choices[0].message.parsed
    assert isinstance(seen, Seen)
    asked = {"role": "user", "content": "What colour is the 2?", "images": [picture()]}
    schema = Seen.model_json_schema()
    answer = ollama.Client(talker.url).chat(MODEL, [asked], format=schema, options={"num_predict": 60})
    assert Seen.model_validate_json(answer.message.content).digit in range(10)


def test_what_ends_by_itself_under_json_object_is_one(talker):
    """Mini never learnt JSON and seldom ends an object: drawn wildly, some of its objects do."""

    def ask(seed):
        options = {"temperature": 2.0, "seed": seed, "response_format": {"type": "json_object"}}
        return talker.ask("What colour is the 2?", picture(), max_tokens=20, **options).choices[0]

    with ThreadPoolExecutor(8) as askers:
        answers = list(askers.map(ask, range(8)))
    assert all(answer.message.content.startswith("{") for answer in answers)
    ended = [answer.message.content for answer in answers if answer.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_streams_and_ollama_s_format_give_the_same(talker):
    asked = ("What colour is the 2?", picture())
    client = ollama.Client(talker.url)
    messages = [{"role": "user", "content": asked[0], "images": [asked[1]]}]
    for ours, theirs in ((formatted(SCHEMAS["array"]), SCHEMAS["array"]), ({"type": "json_object"}, "json")):
        whole = talker.ask(*asked, max_tokens=25, response_format=ours).choices[0].message.content
        pieces = talker.ask(*asked, max_tokens=25, response_format=ours, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
        answer = client.chat(MODEL, messages, format=theirs, options={"num_predict": 25})
        assert answer.message.content == whole
        assert whole[0] in "{["


def test_an_answer_that_is_cut_off_says_so(talker):
    cut = talker.ask("What colour is the 2?", picture(), max_tokens=3, response_format=formatted(SCHEMAS["object"]))
    assert cut.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"allOf": [{"pattern": f"a.{{{count}}}b"} for count in range(40)]}, "does not support 'allOf' in a JSON"),
        (
            {"type": "object", "properties": {"a": {"not": {}}}},
            "does not support 'not' in a JSON schema; leave it out.",
        ),
        ({"anyOf": [{"type": "string"}], "pattern": "a"}, "has 'pattern' beside 'anyOf'; put it into what"),
        ({"$ref": "#/$defs/a", "minLength": 2}, "has 'minLength' beside '$ref'"),
        ({"$ref": "#/$defs/a", "anyOf": []}, "has 'anyOf' beside '$ref'"),
        ({"items": {"x-guidance": {"lenient": True}}}, "does not support 'x-guidance'"),
        ({"enum": ["x" * 20_000]}, f"the limit is {grammar.MAX_BYTES}. Make it smaller."),
        ({"type": "nonsense"}, "answers cannot be held to the JSON schema: Invalid type: nonsense."),
        ({"type": "string", "pattern": "(?=a)"}, "cannot be held to the JSON schema"),
        ({"$ref": "http://127.0.0.1:1/a.json"}, "cannot be held to the JSON schema"),
        ({"const": "\ud800"}, "cannot be held to the JSON schema"),
        ({"properties": 5}, "cannot be held to the JSON schema: properties must be an object."),
    ],
)
def test_schemas_that_cannot_be_met_or_made_are_refused(talker, schema, words):
    for path, body in (
        ("/v1/chat/completions", {"response_format": formatted(schema), "messages": asking("a?")}),
        ("/api/generate", {"format": schema, "prompt": "a?"}),
    ):
        reply = httpx.post(talker.url + path, content=json.dumps({"model": MODEL, **body}), headers=JSON, timeout=30)
        error = reply.json()["error"]
        assert (reply.status_code, words in (error if path.startswith("/api") else error["message"])) == (400, True)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"type": "json_schema"}, "response_format.json_schema goes with the type 'json_schema'"),
        ({"type": "text", "json_schema": {"schema": {}}}, "response_format.json_schema goes with the type"),
        ({"type": "grammar"}, "response_format.type must be 'text', 'json_object' or 'json_schema', got 'grammar'."),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema is missing."),
    ],
)
def test_formats_that_are_none_are_refused(server, given, words):
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask("a?", response_format=given)
    assert words in refused.value.message


def test_a_grammar_that_fails_on_the_way_ends_its_own_answer(talker):
    nowhere = {"$ref": "#"}  # it can be made, and lets nothing be said
    with ThreadPoolExecutor(2) as askers:
        plain = askers.submit(talker.ask, "What colour is the 2?", picture())
        with pytest.raises(openai.BadRequestError, match="could not be held to the JSON schema; make that simpler"):
            talker.ask("What colour is the 2?", picture(), response_format=formatted(nowhere))
        assert plain.result().choices[0].message.content


def test_without_the_library_a_schema_is_refused_by_name(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"pip install 'crosstrim\[json\]'"):
        server.ask("a?", response_format={"type": "json_object"})
    assert server.ask("a?", response_format={"type": "text"}).choices


def test_one_schema_is_made_at_a_time_and_waits_no_longer_than_its_request(loaded):
    made = grammar.Grammars(loaded[1].tokenizer, frozenset([2]))
    with made._lock, pytest.raises(TimeoutError):
        made.grammar({"type": "object"}, deadline=0.0)


def test_schemas_are_checked_all_the_way_down():
    for place in ("items", "additionalProperties"):
        with pytest.raises(InputError, match="'not'"):
            grammar.check({place: {"not": {}}})
    for place in ("anyOf", "prefixItems"):
        with pytest.raises(InputError, match="'not'"):
            grammar.check({place: [{"not": {}}]})
    for place in ("$defs", "definitions", "properties"):
        with pytest.raises(InputError, match="'not'"):
            grammar.check({place: {"a": {"not": {}}}})
        grammar.check({place: {"not": {"type": "string"}}})  # a name, not a keyword
    for schema in SCHEMAS.values():
        grammar.check(schema)


def test_logprobs_are_those_of_the_model_and_change_no_answer(talker):
    asked = ("What colour is the 2?", picture())
    plain = talker.ask(*asked, max_tokens=12).choices[0]
    assert plain.logprobs is None
    told = talker.ask(*asked, max_tokens=12, logprobs=True, top_logprobs=3).choices[0]
    assert told.message.content == plain.message.content
    content = told.logprobs.content
    assert bytes(byte for one in content for byte in one.bytes).decode().strip() == plain.message.content
    for one in content:
        assert one.token.encode() == bytes(one.bytes)
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob  # greedy
        assert one.logprob <= 0
    model, processor = crosstrim.load("mini")
    inputs = answering.encode(processor, [Image.open(BytesIO(asked[1]))], [asked[0]])
    alone = answering.generate(model, processor, inputs, config=TrimConfig(k=0.25), max_new_tokens=1)
    likelihoods = alone.logits[0].float().log_softmax(-1)
    for place, value in enumerate(likelihoods.topk(3).values.tolist()):
        assert content[0].top_logprobs[place].logprob == pytest.approx(value, abs=1e-4)


def test_logprobs_in_streams_under_schemas_and_in_ollama_s_answers(talker):
    asked = ("What colour is the 2?", picture())
    options = {"max_tokens": 30, "logprobs": True, "response_format": formatted(SCHEMAS["object"])}
    whole = talker.ask(*asked, **options).choices[0]
    assert all(one.top_logprobs == [] for one in whole.logprobs.content)
    # Of the model itself, which would not have said what the schema made it say.
    assert min(one.logprob for one in whole.logprobs.content) < math.log(0.5)
    pieces = [piece.choices[0] for piece in talker.ask(*asked, **options, stream=True)]
    streamed = [one for piece in pieces if piece.logprobs for one in piece.logprobs.content]
    assert streamed == whole.logprobs.content
    assert "".join(one.token for one in streamed).strip() == whole.message.content
    body = {"model": MODEL, "prompt": asked[0], "images": [base64.b64encode(asked[1]).decode()], "logprobs": True}
    body |= {"format": SCHEMAS["object"], "options": {"num_predict": 30}, "top_logprobs": 2}
    answer = httpx.post(f"{talker.url}/api/generate", json={**body, "stream": False}, timeout=60).json()
    assert [one["logprob"] for one in answer["logprobs"]] == [one.logprob for one in streamed]
    assert all(len(one["top_logprobs"]) == 2 for one in answer["logprobs"])
    lines = [
        json.loads(line) for line in httpx.post(f"{talker.url}/api/generate", json=body, timeout=60).iter_lines()
    ]
    assert [one for line in lines for one in line.get("logprobs", ())] == answer["logprobs"]


def test_a_number_of_logprobs_goes_with_asking_for_them(server):
    with pytest.raises(openai.BadRequestError, match="top_logprobs=3 goes with logprobs=true"):
        server.ask("a?", top_logprobs=3)
    with pytest.raises(openai.BadRequestError, match="top_logprobs must be less than or equal to 20, got 21"):
        server.ask("a?", logprobs=True, top_logprobs=21)
    until(lambda: server.service.unfinished == 0)


def test_the_bytes_of_tokens_are_those_of_the_text(loaded):
    text = 'What "colour" is the 2? \U0001f600 é \n\x00'
    for tokenizer in (crosstrim.load("mini")[1].tokenizer, loaded[1].tokenizer):
        text = text if tokenizer is not loaded[1].tokenizer else "what is it?"
        texts = TokenTexts(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(map(texts.bytes_of, ids)).decode() == text
        assert texts.bytes_of(tokenizer.convert_tokens_to_ids("<|image|>")) == b"<|image|>"


def test_an_answer_s_logprobs_go_with_pictures_of_any_seed(server):
    told = server.ask("what is it?", png(3), max_tokens=9, logprobs=True, temperature=1.5, seed=2, top_logprobs=2)
    content = told.choices[0].logprobs.content
    assert len(content) == told.usage.completion_tokens == 9
    assert any(one.logprob < one.top_logprobs[0].logprob for one in content)  # drawn, and not the likeliest
