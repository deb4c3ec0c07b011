"""`crosstrim calibrate`, and `--calibrated` where others take what it found: options, streams, refusals."""

from __future__ import annotations

import json

import pytest

from tests.support.questions import without_answers, write_pictures, write_rows


@pytest.fixture
def data(tmp_path):
    write_pictures(tmp_path)
    return write_rows(tmp_path, without_answers())


@pytest.fixture
def calibrate(run, checkpoint, data, tmp_path):
    """Everything that is kept changes nothing, so that there is a budget to choose."""

    def call(*arguments, data=data, keep=("1.0",), levels=("--risk", "0.5", "--confidence", "0.8"), out="run.json"):
        keeps = [one for value in keep for one in ("--keep", value)]
        options = [*keeps, *levels, "--max-new-tokens", 2, "--batch-size", 4]
        return run("calibrate", *([data] if data else []), "--model", checkpoint, "--out", tmp_path / out,
                   *options, *arguments)  # fmt: skip

    return call


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr("crosstrim.asking.loading.load", lambda *_args, **_options: pytest.fail("a model was loaded"))


def test_a_budget_is_chosen_and_written(calibrate, tmp_path, data):
    result = calibrate("--json", "--questions", 8, "--seed", 3)
    assert (result.code, result.stderr) == (0, f"crosstrim: wrote {tmp_path}/run.json\n")
    written = json.loads((tmp_path / "run.json").read_text())
    assert result.json == {
        name: value for name, value in written.items() if name not in ("items", "visible", "predictions")
    }
    assert written["chosen"]["label"] == "contribution keep=1.0"
    assert written["dataset"]["name"] == str(data)
    assert written["dataset"]["questions"] == 8
    assert written["calibration"] == {"risk": 0.5, "confidence": 0.8, "loss": "answer", "seed": 3, "drawn_from": 12}


def test_people_read_a_table_and_the_choice(calibrate):
    header, row, chosen = calibrate().stdout.splitlines()
    assert header.split("   ")[0] == "budget"
    assert row.split()[:5] == ["contribution", "keep=1.0", "100.0%", "0", "of"]
    assert row.split()[-1] == "yes"
    assert chosen == "chosen: contribution keep=1.0"


def test_the_same_command_again_only_reads(calibrate, tmp_path, monkeypatch):
    calibrate()
    monkeypatch.setattr("crosstrim.asking.answering.generate", lambda *_args, **_options: pytest.fail("asked again"))
    again = calibrate()
    assert again.stderr == f"crosstrim: {tmp_path}/run.json is complete already; nothing was run.\n"
    other = calibrate(levels=("--risk", "0.4", "--confidence", "0.8"))
    assert other.code == 1
    assert "other calibration.risk (0.5 there, 0.4 here)" in other.stderr


def test_an_interruption_says_how_to_go_on(calibrate, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("crosstrim.asking.answering.generate", interrupted)
        result = calibrate()
    assert result.code == 130
    assert result.stderr == "crosstrim: interrupted; what is done is kept, and the same command goes on.\n"
    assert calibrate().code == 0


def test_a_folder_of_pictures_and_the_embedded_questions(calibrate, questions, tmp_path):
    folder = tmp_path / "pictures"
    write_pictures(folder)
    result = calibrate("--question", "what is it?", "--json", data=folder)
    assert result.json["dataset"]["questions"] == 4
    result = calibrate("--json", "--loss", "wrong", data=None, out="other.json")
    assert result.json["dataset"]["name"] == "mini-heldout"


def test_without_a_certified_budget_it_ends_with_one(calibrate, monkeypatch, tmp_path):
    def all_lost(rule, predictions, *_rest):
        return [True] * len(predictions[rule.setting.label]["answer"])

    monkeypatch.setattr("crosstrim.eval.rules.Rule.lost", all_lost)
    result = calibrate()
    assert result.code == 1
    wrote, refused = result.stderr.splitlines()
    assert wrote == f"crosstrim: wrote {tmp_path}/run.json"
    assert refused.startswith(
        "crosstrim: no budget is certified: the largest budget, contribution keep=1.0, lost 8 of 8"
    )
    assert result.stdout.splitlines()[1].split()[-1] == "no"


@pytest.mark.usefixtures("nothing_loads")
def test_too_few_questions_are_refused_before_a_model_is_loaded(calibrate):
    result = calibrate(levels=("--risk", "0.05"))
    assert (result.code, result.stdout) == (1, "")
    assert "12 questions cannot support a risk of at most 0.05 with confidence 0.95" in result.stderr
    assert "at least 59" in result.stderr


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--risk", "1.5"], "risk=1.5 must lie between 0 and 1"),
        (["--loss", "kl"], "loss='kl' must be one of"),
        (["--k", "0.5"], "no common order"),
        (["--keep", "8"], "shares and numbers of features"),
        (["--k-base", "all"], "--k-base goes with --k."),
        (["--policy", "onion"], "policy='onion' is unknown"),
        (["--to", "page"], "--to goes with --report FILE.json."),
        (["--report", "run.json"], "has no effect with --report"),
        (["--on-error", "ask"], "--on-error ask must be one of stop, skip."),
    ],
)
def test_wrong_usage(calibrate, tmp_path, arguments, words):
    result = calibrate(*arguments)
    assert (result.code, result.stdout) == (2, "")
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert not list(tmp_path.glob("run*"))


def test_a_page_is_drawn(calibrate, run, tmp_path):
    calibrate(keep=("1.0", "0.1"))
    result = run("calibrate", "--report", tmp_path / "run.json")
    assert result.stdout.splitlines() == [f"{tmp_path}/run/report.md", f"{tmp_path}/run/risk.png"]
    page = (tmp_path / "run" / "report.md").read_text()
    assert "The smallest budget certified for a risk of at most 50.0 % with confidence 80.0 % is contribution" in page
    result = run("calibrate", "--report", tmp_path / "run.json", "--to", tmp_path / "page", "--json")
    assert result.json == {"files": [f"{tmp_path}/page/{name}" for name in ("report.md", "risk.png")]}


def test_ask_and_batch_trim_as_was_found(calibrate, run, checkpoint, picture, data, tmp_path):
    calibrate("--whole-first-layer", "--kv-dtype", "int8", "--merge")
    asked = run("ask", picture, "what?", "--model", checkpoint, "--calibrated", tmp_path / "run.json", "--json")
    config = asked.json["report"]["config"]
    found = [config[name] for name in ("keep", "trim_first_layer", "kv_dtype", "merge")]
    assert found == [1.0, False, "int8", True]
    result = run("batch", data, tmp_path / "answers.jsonl", "--model", checkpoint, "--calibrated",
                 tmp_path / "run.json", "--max-new-tokens", 2, "--json")  # fmt: skip
    assert result.json["answered"] == 12


@pytest.mark.parametrize("verb", ["ask", "batch", "serve"])
def test_another_dtype_is_refused_by_name(calibrate, run, checkpoint, picture, data, tmp_path, verb):
    calibrate()
    begin = {
        "ask": ["ask", picture, "what?"],
        "batch": ["batch", data, tmp_path / "answers.jsonl"],
        "serve": ["serve", "--port", 0],
    }
    result = run(*begin[verb], "--model", checkpoint, "--calibrated", tmp_path / "run.json", "--dtype", "bfloat16")
    assert (result.code, result.stdout) == (1, "")
    assert "run.json does not hold for this trim: dtype (float32 there, bfloat16 here)" in result.stderr
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    "beside",
    [["--k", "0.5"], ["--keep", "0.5"], ["--lossless"], ["--policy", "mean"], ["--rating-rows", "last_turn"],
     ["--k-base", "all"], ["--whole-first-layer"], ["--kv-dtype", "int8"], ["--merge"]],
    ids=" ".join,
)  # fmt: skip
def test_a_calibration_says_it_all(run, picture, beside):
    result = run("ask", picture, "what?", "--calibrated", "run.json", *beside)
    assert (result.code, result.stdout) == (2, "")
    assert f"{beside[0]} has no effect with --calibrated" in " ".join(result.stderr.replace("│", " ").split())


def test_sglang_is_not_what_was_calibrated(calibrate, run, tmp_path):
    calibrate()
    result = run("serve", "--engine", "sglang", "--calibrated", tmp_path / "run.json")
    assert (result.code, result.stdout) == (2, "")
    assert "--calibrated does not go with --engine sglang" in " ".join(result.stderr.replace("│", " ").split())
