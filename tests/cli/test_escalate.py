"""`--escalate` of the verbs that answer: what they print and write, and what they refuse."""

from __future__ import annotations

import json

import pytest

from tests.support.questions import without_answers, write_pictures, write_rows


def asked(run, picture, checkpoint, *arguments):
    return run("ask", picture, "what?", "--model", checkpoint, "--keep", 9, "--max-new-tokens", 3, *arguments)


def test_ask_tells_each_attempt(run, picture, checkpoint):
    plain = asked(run, picture, checkpoint, "--json", "--compare").json
    again = asked(run, picture, checkpoint, "--json", "--escalate", 1.0).json
    assert again["answer"] == plain["untrimmed"]["answer"]
    assert again["escalated"]
    assert [one["budget"] for one in again["attempts"]] == ["keep=9", "untrimmed"]
    assert "report" not in again
    lines = asked(run, picture, checkpoint, "--escalate", 1.0, "--escalate-to", 12).stdout.splitlines()
    assert [line.rpartition(" ")[0] for line in lines[1:3]] == [
        "keep=9: kept 9 of 34 visible features, lowest token probability",
        "keep=12: kept 12 of 34 visible features, lowest token probability",
    ]
    assert any(line.startswith("kept       12 of 34") for line in lines[3:])


def test_batch_writes_attempts(run, checkpoint, tmp_path):
    write_pictures(tmp_path / "rows")
    rows, out = write_rows(tmp_path / "rows", without_answers(3)), tmp_path / "out.jsonl"
    options = ("--model", checkpoint, "--keep", 3, "--max-new-tokens", 2)
    result = run("batch", rows, out, *options, "--escalate", 1.0, "--escalate-to", 0.9, "--escalate-to", "lossless")
    assert result.code == 0, result.stderr
    for row in map(json.loads, out.read_text().splitlines()):
        assert [one["budget"] for one in row["attempts"]] == ["keep=3", "keep=0.9", "lossless"]
        assert row["kept"] == row["visible"]


def test_eval_runs_without_and_with_it(run, checkpoint, questions, tmp_path):
    options = (
        "--out",
        tmp_path / "run.json",
        "--max-new-tokens",
        2,
        "--policy",
        "grid",
        "--keep",
        "0.5",
        "--lossless",
    )
    result = run("eval", "--model", checkpoint, *options, "--escalate", 1.0, "--json")
    rows = {row["group"]: row["overall"] for row in result.json["summary"]}
    again = "grid keep=0.5, below 1.0 again untrimmed"
    assert list(rows) == ["untrimmed", "lossless", "grid keep=0.5", again]
    assert rows[again]["unchanged"]["mean"] == 1.0
    assert rows[again]["kept_fraction"] == pytest.approx(rows["grid keep=0.5"]["kept_fraction"] + 1, abs=1e-5)
    predictions = json.loads((tmp_path / "run.json").read_text())["predictions"]
    assert all(predictions[again]["escalated"])
    assert all(0 < one < 1 for one in predictions["untrimmed"]["lowest_probability"])


def test_calibrate_tests_both_together(run, checkpoint, tmp_path):
    write_pictures(tmp_path / "rows")
    rows, out = write_rows(tmp_path / "rows", without_answers()), tmp_path / "run.json"
    options = ("--out", out, "--risk", 0.5, "--confidence", 0.8, "--max-new-tokens", 2, "--keep", 3)
    result = run("calibrate", rows, "--model", checkpoint, *options, "--escalate", 1.0)
    assert result.stdout.splitlines()[0].split("   ")[0] == "budget"
    assert "12 of 12" in result.stdout.splitlines()[1]
    assert result.stdout.splitlines()[-1] == "chosen: contribution keep=3, again below 1.0"
    picture = tmp_path / "rows" / "0.png"
    answer = run("ask", picture, "why?", "--model", checkpoint, "--calibrated", out, "--max-new-tokens", 2, "--json")
    assert [one["budget"] for one in answer.json["attempts"]] == ["keep=3", "untrimmed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ask", "cat", "why?", "--keep", 9, "--escalate", 0), "escalate=0.0 must be a probability"),
        (("ask", "cat", "why?", "--keep", 9, "--escalate-to", 12), "--escalate-to goes with --escalate"),
        (("ask", "cat", "why?", "--lossless", "--escalate", 0.9), "drops nothing visible"),
        (("ask", "cat", "why?", "--keep", 9, "--escalate", 0.9, "--escalate-to", "all"), "'all' is neither"),
        (("serve", "--keep", 9, "--escalate", 0.9, "--escalate-to", 3), "keeps no more than 9"),
        (("eval", "--escalate", 0.9), "--escalate goes with --out"),
        (("eval", "--out", "run.json", "--escalate-to", 3), "--escalate-to goes with --escalate"),
        (("calibrate", "--escalate", 2), "escalate=2.0 must be a probability"),
    ],
)
def test_wrong_usage(run, monkeypatch, arguments, words):
    monkeypatch.setattr("crosstrim.asking.loading.load", lambda *_args, **_options: pytest.fail("a model was loaded"))
    result = run(*arguments)
    assert result.code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
