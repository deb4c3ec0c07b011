"""`crosstrim analyze`: what it prints and writes, and what it refuses before doing any work."""

from __future__ import annotations

import json

import pytest

import crosstrim
from crosstrim.data import dataset
from crosstrim.eval import analysis, defaults
from tests.support import tiny

PARTS = {"format", "dataset", "model", "config", "layers", "visible_features", "sparsity", "agreement", "first_layer"}
PARTS |= {"memory", "versions", "compat"}


@pytest.fixture
def analyze(run, checkpoint):
    return lambda *arguments, **options: run("analyze", "--model", checkpoint, *arguments, **options)


@pytest.fixture
def nothing_loads(monkeypatch):
    """Whatever is refused must be refused before a model is loaded."""
    monkeypatch.setattr("crosstrim.asking.loading.load", lambda *_args, **_options: pytest.fail("a model was loaded"))


def test_one_picture_is_a_dataset_of_one(analyze, picture, checkpoint, tmp_path):
    found = analyze(picture, "what is it?", "--json").json
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"image": str(picture), "question": "what is it?", "answers": "?"}) + "\n")
    expected = analysis.run(*crosstrim.load(checkpoint), dataset.read(rows), name="tiny")
    assert set(found) == PARTS
    for part in (
        "layers",
        "visible_features",
        "sparsity",
        "agreement",
        "first_layer",
        "config",
        "versions",
        "compat",
    ):
        assert found[part] == expected[part]
    assert found["visible_features"] == 2 * tiny.FEATURES_PER_TILE
    assert found["model"]["name"] == str(checkpoint)


def test_a_picture_from_standard_input(analyze, picture):
    piped = analyze("-", "what is it?", "--json", stdin=picture.read_bytes()).json
    assert piped["sparsity"] == analyze(picture, "what is it?", "--json").json["sparsity"]


def test_the_embedded_questions_are_the_default(analyze, questions):
    found = analyze("--json").json
    assert (found["dataset"]["name"], found["dataset"]["questions"]) == ("mini-heldout", 18)
    assert analyze().stdout.startswith("questions read: 18 of mini-heldout\n")
    fewer = analyze("--json", "--questions", 5).json
    assert fewer["dataset"]["questions"] == 5
    assert fewer["sparsity"] != found["sparsity"]


def test_your_own_questions_and_that_some_are_left_out(analyze, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "QUESTIONS", 3)
    rows = tmp_path / "own.jsonl"
    row = {"image": str(picture), "question": "what?", "answers": "?"}
    rows.write_text("\n".join(json.dumps(row) for _ in range(4)) + "\n")
    result = analyze("--data", rows, "--json")
    assert result.json["dataset"]["questions"] == 3
    assert result.stderr == "crosstrim: reads the first 3 of 4 questions; --questions 4 reads all.\n"
    assert analyze("--data", rows, "--json", "--questions", 4).stderr == ""


def test_a_folder_of_pictures_and_questions_without_answers(analyze, picture, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.png").write_bytes(picture.read_bytes())
    (folder / "notes.txt").write_text("?")
    result = analyze(folder, "what?", "--json", "--questions", 9)
    assert (result.json["dataset"]["name"], result.json["dataset"]["questions"]) == (str(folder), 2)
    assert "passed over 1 file" in result.stderr
    rows = tmp_path / "own.jsonl"
    rows.write_text("\n".join(json.dumps({"image": f"photos/{name}.png", "question": "what?"}) for name in "ab"))
    assert analyze("--data", rows, "--json").json["sparsity"] == result.json["sparsity"]


def test_people_read_tables(analyze, picture):
    result = analyze(picture, "what is it?")
    lines = [line.strip() for line in result.stdout.splitlines()]
    for title in ("Sparsity", "Agreement between layers", "What the first layer's union holds of later attention"):
        assert title in lines
    assert lines[:3] == [f"questions read: 1 of {picture}", "", "Sparsity"]
    assert any(line.startswith("KV bytes of") for line in lines)
    assert any(line.startswith("1 and 3") for line in lines)
    assert result.stderr == ""


def test_a_shape_needs_no_model(run, nothing_loads):
    found = run("analyze", "--shape", "90b", "--json").json
    assert set(found) == {"format", "config", "memory", "versions", "compat"}
    assert found["memory"]["shape"]["text_layers"] == 100
    assert found["versions"]["device"] == "none"
    printed = run("analyze", "--shape", "11b").stdout
    assert "KV bytes of Llama-3.2-11B-Vision-Instruct, computed" in printed
    assert "25 GiB (12.5x)" in printed


def test_files(analyze, picture, tmp_path):
    result = analyze(picture, "what is it?", "--to", tmp_path / "out", "--json")
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == ["agreement.png", "analysis.json", "analysis.md", "memory.png", "sparsity.png"]
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == result.json
    assert result.stderr.count("crosstrim: wrote ") == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["PICTURE"], ("IMAGE", "QUESTION")),
        (["PICTURE", "what?", "--shape", "11b"], ("IMAGE and --shape",)),
        (["--data", "x.jsonl", "--shape", "11b"], ("--data and --shape",)),
        (["--shape", "7b"], ("--shape 7b", "11b, 90b")),
        (["--shape", "11b", "--questions", "3"], ("--questions", "--data")),
        (["PICTURE", "what?", "--questions", "3"], ("--questions", "--data")),
        (["--data", "FOLDER"], ("is a folder", "IMAGE")),
        (["--on-error", "guess"], ("--on-error guess", "stop, skip")),
    ],
)
def test_contradictions_are_wrong_usage(run, nothing_loads, picture, tmp_path, arguments, words):
    named = {"PICTURE": picture, "FOLDER": tmp_path}
    arguments = [named.get(one, one) for one in arguments]
    result = run("analyze", *arguments, "--to", tmp_path / "out")
    assert result.code == 2
    told = " ".join(result.stderr.replace("│", " ").split())
    assert all(one in told for one in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png", "what?"], ("missing.png",)),
        (["PICTURE", " "], ("'question'", "empty")),
        (["PICTURE", "<|image|> what?"], ("<|image|>",)),
        (["--data", "missing.jsonl"], ("missing.jsonl",)),
    ],
)
def test_refusals(run, nothing_loads, picture, arguments, words):
    result = run("analyze", *[picture if one == "PICTURE" else one for one in arguments])
    assert result.code == 1
    assert all(one in result.stderr for one in words)
    assert result.stdout == ""
