"""`crosstrim bench`: what it prints, writes and refuses, and its exit code."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from crosstrim.bench import suites

BAR = "second question's time to first token, of the features given untrimmed"


@pytest.fixture
def tiny(monkeypatch):
    """Whatever is asked for runs at the smallest size."""
    for name, suite in suites.SUITES.items():
        settings = dict.fromkeys(suite.settings, suite.settings["tiny"])
        monkeypatch.setitem(suites.SUITES, name, replace(suite, settings=settings))


@pytest.fixture
def rows(monkeypatch):
    """A suite "session" whose second question takes so often the time of one that is given the features untrimmed."""

    def give(ratio, ms=1.0):
        def run(**settings):
            for way, question, share, entries in (
                ("session", "first", 1.0, 1),
                ("session", "second", ratio, 0),
                ("features given", "second", 1.0, 0),
            ):
                common = {"way": way, "question": question, "vision_tower_entries": entries}
                yield common | {"ms": ms * share, "ratio": share}

        monkeypatch.setitem(suites.SUITES, "session", replace(suites.SUITES["session"], run=run))

    return give


def test_json_is_the_result_and_the_file_holds_the_same(run, tiny, tmp_path):
    result = run("bench", "decode", "--quick", "--json", "--out", tmp_path / "decode.json")
    assert (result.code, result.json["suite"], result.json["size"]) == (0, "decode", "quick")
    assert json.loads((tmp_path / "decode.json").read_text()) == result.json
    assert len((tmp_path / "decode.csv").read_text().splitlines()) == 1 + len(result.json["rows"])
    assert result.stderr.count("crosstrim: wrote ") == 2


def test_people_read_a_table_and_with_check_the_bars(run, rows):
    rows(1.05)
    plain = run("bench", "session")
    assert plain.code == 0
    assert plain.stdout.startswith("session\n\nway")
    assert "at most" not in plain.stdout
    checked = run("bench", "session", "--check")
    assert checked.code == 0
    (line,) = [line for line in checked.stdout.splitlines() if line.startswith(BAR)]
    assert line.removeprefix(BAR).split() == ["1.05", "1.1", "yes"]
    assert checked.stderr == ""


def test_large_times_are_written_out(run, rows):
    rows(1.0, ms=11450.4)
    assert "11450" in run("bench", "session").stdout.split()


def test_a_missed_bar_ends_with_one_and_is_named(run, rows, tmp_path):
    rows(1.2)
    assert run("bench", "session").code == 0
    result = run("bench", "session", "--check", "--out", tmp_path / "session.json")
    assert result.code == 1
    assert f"crosstrim: missed: {BAR}\n" in result.stderr
    assert "NO" in result.stdout
    assert json.loads((tmp_path / "session.json").read_text())["bars"][0]["met"] is False


def test_a_folder_gets_everything(run, rows, tmp_path):
    rows(1.05)
    result = run("bench", "session", "--to", tmp_path / "out", "--json")
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == ["session.csv", "session.json", "session.md", "session.png"]
    assert result.stderr.count("crosstrim: wrote ") == 4


def test_what_was_measured_stays_when_the_rest_fails(run, monkeypatch, tmp_path):
    def broken(**settings):
        yield {"way": "session", "ms": 1.0}
        raise RuntimeError("no power")

    monkeypatch.setitem(suites.SUITES, "session", replace(suites.SUITES["session"], run=broken))
    with pytest.raises(RuntimeError, match="no power"):
        run("bench", "session", "--out", tmp_path / "session.json")
    left = json.loads((tmp_path / "session.json").read_text())
    assert (left["rows"], left["complete"], left["bars"]) == ([{"way": "session", "ms": 1.0}], False, [])


def test_without_a_gpu(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "gpu", "--out", tmp_path / "gpu.json")
    assert result.code == 1
    assert result.stderr.startswith("crosstrim: the suite gpu needs a CUDA device, and torch sees none; run it on")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["speed"],
            2,
            "SUITE speed must be one of layers, decode, stack, saliency, growth, merge, session, mini, gpu",
        ),
        (["layers", "--out", "layers.csv"], 1, "layers.csv must end in .json"),
        (["layers", "--out", "missing/layers.json"], 1, "create missing first"),
    ],
)
def test_refusals_come_before_any_work(run, monkeypatch, arguments, code, words):
    monkeypatch.setattr(suites, "measure", lambda *_args, **_options: pytest.fail("something was measured"))
    result = run("bench", *arguments)
    assert result.code == code
    assert words in " ".join(result.stderr.replace("│", " ").split())
