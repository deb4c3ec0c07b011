"""`crosstrim ask`: its results, where they go, and what it refuses before doing any work."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MllamaForConditionalGeneration, MllamaProcessor

import crosstrim
from tests.support import tiny

QUESTION = "what is in the picture?"
VISIBLE = 2 * tiny.FEATURES_PER_TILE


@pytest.fixture
def ask(run, picture, checkpoint):
    def call(*arguments, image=picture, **options):
        return run("ask", image, QUESTION, "--model", checkpoint, "--max-new-tokens", 4, *arguments, **options)

    return call


@pytest.fixture
def nothing_loads(monkeypatch):
    """Whatever is refused must be refused before a model is loaded."""
    monkeypatch.setattr("crosstrim.asking.loading.load", lambda *_args, **_options: pytest.fail("a model was loaded"))


def test_people_read_the_answer_first_and_then_the_figures(ask):
    result = ask()
    answer, empty, header, kept, memory, seconds = (line.rstrip() for line in result.stdout.splitlines())
    assert result.code == 0
    assert answer == ask("--json").json["answer"]
    assert empty == ""
    assert header.split() == ["trimmed", "untrimmed"]
    assert f"of {VISIBLE} visible features (" in kept
    assert f"all {tiny.FEATURES_PER_IMAGE}, padding included" in kept
    assert memory.split()[:2] == ["image", "KV"]
    assert memory.count("KiB") == 2
    assert "s, 4 tokens" in seconds
    assert "not run; see --compare" in seconds
    assert result.stderr == ""


def test_json_is_one_object_and_nothing_else(ask):
    result = ask("--json")
    assert set(result.json) == {"answer", "tokens", "seconds", "report"}
    assert result.json["tokens"] == 4
    assert result.json["seconds"] > 0
    report = result.json["report"]
    assert set(report) == {"samples", "kv_bytes", "kv_bytes_untrimmed", "config", "versions", "compat"}
    (image,) = report["samples"][0]["images"]
    assert (image["features"], image["visible"]) == (tiny.FEATURES_PER_IMAGE, VISIBLE)
    assert image["kept"] == len(image["kept_indices"])
    assert 0 < report["kv_bytes"] < report["kv_bytes_untrimmed"]
    assert report["kv_bytes"] / report["kv_bytes_untrimmed"] == pytest.approx(image["kept"] / image["features"])
    assert report["config"] == crosstrim.TrimConfig(k=0.25).to_dict()
    assert report["versions"]["device"] == "cpu"
    assert all(report["compat"].values())
    assert result.stderr == ""


def plain_answer(checkpoint, picture) -> str:
    """The answer of the untrimmed model, by transformers alone."""
    model = MllamaForConditionalGeneration.from_pretrained(checkpoint).eval()
    crosstrim.compat.apply(model)
    processor = MllamaProcessor.from_pretrained(checkpoint)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    inputs = processor(
        images=Image.open(picture),
        text=processor.apply_chat_template([message], add_generation_prompt=True),
        add_special_tokens=False,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=4)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_compare_asks_the_untrimmed_model_too(ask, checkpoint, picture):
    result = ask("--compare", "--json", "--keep", 1).json
    assert set(result["untrimmed"]) == {"answer", "tokens", "seconds"}
    assert result["untrimmed"]["answer"] == plain_answer(checkpoint, picture)
    first, second, *rest = ask("--compare").stdout.splitlines()
    assert first.startswith("trimmed    ")
    assert second == f"untrimmed  {result['untrimmed']['answer']}"
    assert "not run" not in "".join(rest)


def test_lossless_answers_as_the_untrimmed_model(ask, checkpoint, picture):
    result = ask("--lossless", "--json").json
    assert result["answer"] == plain_answer(checkpoint, picture)
    assert result["report"]["samples"][0]["images"][0]["kept"] == VISIBLE


@pytest.mark.parametrize(
    ("arguments", "config", "kept"),
    [
        (["--k", "0.1"], {"k": 0.1}, None),
        (["--keep", "0.5"], {"keep": 0.5}, VISIBLE // 2),
        (["--keep", "7"], {"keep": 7}, 7),
        (["--keep", "1"], {"keep": 1}, 1),
        (["--keep", "1.0"], {"keep": 1.0}, VISIBLE),
        (["--keep", "9999"], {"keep": 9999}, VISIBLE),
        (["--k", "1"], {"k": 1.0}, VISIBLE),
        (["--policy", "random"], {"k": 0.25, "policy": "random"}, 9),
        (["--k-base", "all"], {"k": 0.25, "k_base": "all"}, None),
        (["--whole-first-layer"], {"k": 0.25, "trim_first_layer": False}, None),
        (["--rating-rows", "last_turn"], {"k": 0.25, "rating_rows": "last_turn"}, None),
        (["--kv-dtype", "fp8"], {"k": 0.25, "kv_dtype": "fp8"}, None),
        (["--kv-dtype", "model"], {"k": 0.25}, None),
        (["--keep", "7", "--merge"], {"keep": 7, "merge": True}, 7),
    ],
)
def test_every_option_reaches_the_trim(ask, arguments, config, kept):
    report = ask(*arguments, "--json").json["report"]
    expected = crosstrim.TrimConfig(**config).to_dict()
    turn = report["config"].pop("user_turn_ids")
    expected.pop("user_turn_ids")
    assert report["config"] == expected
    assert kept in (None, report["samples"][0]["images"][0]["kept"])
    assert (turn is not None) == ("last_turn" in arguments)


def test_a_user_turn_is_opened_as_the_tokenizer_writes_it(ask, checkpoint):
    _, processor = crosstrim.load(checkpoint)
    ids = ask("--rating-rows", "last_turn", "--json").json["report"]["config"]["user_turn_ids"]
    assert processor.tokenizer.decode(ids) == "<|start_header_id|>user<|end_header_id|>"


def test_a_picture_comes_from_stdin(ask, picture):
    piped = ask("--json", image="-", stdin=picture.read_bytes())
    assert piped.json["answer"] == ask("--json").json["answer"]


def test_the_model_comes_from_the_environment(run, picture, checkpoint, monkeypatch):
    monkeypatch.setenv("CROSSTRIM_MODEL", str(checkpoint))
    result = run("ask", picture, QUESTION, "--json", "--max-new-tokens", 1)
    assert result.json["tokens"] == 1


def test_an_option_overrules_the_environment(ask, monkeypatch):
    monkeypatch.setenv("CROSSTRIM_MODEL", "/nowhere")
    assert ask("--json").code == 0


def test_overlay_paints_what_the_report_says(ask, picture, tmp_path):
    target = tmp_path / "overlay.png"
    result = ask("--overlay", target, "--json", "--keep", 9)
    assert result.stderr == f"crosstrim: wrote {target}\n"
    kept = result.json["report"]["samples"][0]["images"][0]["kept_indices"]
    original, painted = np.asarray(Image.open(picture)), np.asarray(Image.open(target))
    painted = painted[: original.shape[0], : original.shape[1]]  # the legend lies below
    # A patch is 14 pixels wide here; its middle is clear exactly when it was kept.
    clear = (original == painted).all(-1)[7::14, 7::14]
    for row, column in np.ndindex(clear.shape):
        tile, within = divmod(column, 4)
        feature = tile * tiny.FEATURES_PER_TILE + 1 + row * 4 + within
        assert clear[row, column] == (feature in kept)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--overlay", "out.doc"], ("out.doc", ".png")),
        (["--overlay", "no/out.png"], ("no/out.png", "create no")),
    ],
)
def test_refusals_take_one_line_and_no_work(ask, arguments, words):
    result = ask(*arguments)
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.startswith("crosstrim: ")
    assert all(one in result.stderr for one in words)
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--k", "2"], ("k=2.0", "at most 1")),
        (["--keep", "0"], ("keep=0 ", "at least 1")),
        (["--keep", "1.5"], ("keep=1.5", "at most 1")),
        (["--keep", "nan"], ("keep=nan", "a share")),
        (["--policy", "onion"], ("policy='onion'", "contribution, dpp, ", "union, value.")),
        (["--rating-rows", "some"], ("rating_rows='some'", "'last_turn'")),
        (["--k-base", "some"], ("k_base='some'", "'visible'")),
    ],
)
def test_refused_values_take_one_line_and_no_work(ask, arguments, words):
    result = ask(*arguments)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("crosstrim: ")
    assert all(one in result.stderr for one in words)
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--k", "0.5", "--keep", "0.5"], ("--k and --keep", "give one")),
        (["--keep", "1", "--lossless"], ("--keep and --lossless", "give one")),
        (["--lossless", "--policy", "grid"], ("--policy", "--lossless", "leave one")),
        (["--lossless", "--policy", "mass:0.5"], ("--policy", "--lossless")),
        (["--lossless", "--rating-rows", "last_turn"], ("--rating-rows", "--lossless")),
        (["--lossless", "--k-base", "all"], ("--k-base", "--lossless")),
        (["--lossless", "--merge"], ("--merge", "--lossless")),
        (["--keep", "0.5", "--k-base", "all"], ("--k-base", "--keep")),
        (["--keep", "half"], ("'half'", "0.5", "2048")),
        (["--kv-dtype", "int4"], ("'int4'", "model, int8, fp8")),
        (["--max-new-tokens", "0"], ("'--max-new-tokens'",)),
        (["--unknown"], ("--unknown",)),
    ],
)
def test_wrong_usage_ends_with_two(ask, arguments, words):
    result = ask(*arguments)
    assert (result.code, result.stdout) == (2, "")
    told = " ".join(result.stderr.replace("│", " ").split())
    assert all(one in told for one in words)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("verb", ["ask", "analyze"])
def test_an_unknown_example_gets_the_nearest(run, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    result = run(verb, "catt", QUESTION)
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.startswith("crosstrim: there is no picture 'catt', and no example of that name")
    assert result.stderr.endswith(" Did you mean 'cat'?\n")


def test_one_token_is_no_tokens(ask):
    lines = ask("--max-new-tokens", 1, "--compare").stdout.splitlines()
    assert re.fullmatch(r"time( +\d+\.\d\d s, 1 token){2} *", lines[-1])


@pytest.mark.usefixtures("nothing_loads")
def test_a_bad_picture_is_refused_before_the_model_loads(ask, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    result = ask(image=tmp_path / "bad.png")
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"crosstrim: {tmp_path}/bad.png is no picture that crosstrim reads")


@pytest.mark.usefixtures("nothing_loads")
def test_the_picture_itself_is_never_overwritten(ask, picture):
    before = picture.read_bytes()
    result = ask("--overlay", picture)
    assert result.stderr == f"crosstrim: --overlay {picture} is the picture itself; give another file.\n"
    assert picture.read_bytes() == before


@pytest.mark.usefixtures("nothing_loads")
def test_a_picture_too_thin_for_an_overlay_is_refused_before_the_model_loads(ask, tmp_path):
    Image.new("1", (1_000_000, 1)).save(tmp_path / "thin.png")
    result = ask("--overlay", tmp_path / "overlay.png", image=tmp_path / "thin.png")
    assert (result.code, result.stdout) == (1, "")
    assert "a picture of 1000000 x 1 pixels is too thin for an overlay" in result.stderr


@pytest.mark.parametrize("question", ["", "  ", "what is <|image|> about?"])
def test_a_question_must_be_one(run, picture, checkpoint, tmp_path, question):
    target = tmp_path / "overlay.png"
    result = run("ask", picture, question, "--model", checkpoint, "--overlay", target)
    assert result.code == 1
    assert "crosstrim: the question " in result.stderr
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "./nowhere"], 1, ("'./nowhere'", "check the path")),
        (["--dtype", "int8"], 2, ("dtype='int8'", "auto, bfloat16")),
        (["--device", "warp"], 2, ("crosstrim: 'warp'",)),
        (["--device", "cuda:99"], 2, ("crosstrim: ", "'cuda:99'", "torch sees")),
    ],
)
def test_what_cannot_be_loaded_is_told(ask, arguments, code, words):
    result = ask(*arguments)
    assert (result.code, result.stdout) == (code, "")
    assert all(one in result.stderr for one in words)


def test_the_dtype_is_taken(ask):
    assert ask("--dtype", "bfloat16", "--json").json["report"]["kv_bytes_untrimmed"] == (
        ask("--json").json["report"]["kv_bytes_untrimmed"] // 2
    )


def test_a_full_device_takes_one_line(ask, monkeypatch):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")

    monkeypatch.setattr("crosstrim.asking.answering.generate", full)
    result = ask()
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.startswith("crosstrim: the device ran out of memory; try --dtype bfloat16")
    assert result.stderr.count("\n") == 1
