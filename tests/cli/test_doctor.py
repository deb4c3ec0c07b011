"""`crosstrim doctor` and `crosstrim examples`."""

from __future__ import annotations

import platform

import torch
import transformers

import crosstrim
from crosstrim import mini
from crosstrim.asking import environment
from crosstrim.errors import IncompatibleTransformersError
from crosstrim.models import probe
from tests.support import tiny


def test_doctor_tells_versions_and_findings(run):
    result = run("doctor", "--json")
    assert result.code == 0
    found = result.json
    assert set(found) == {"versions", "cuda", "threads", "extras", "trimming", "compat"}
    assert found["versions"] == {
        "crosstrim": crosstrim.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": environment.best_device(),
    }
    assert [finding["name"] for finding in found["compat"]] == [one.name for one in crosstrim.compat.check()]
    assert not any({"repaired", "open"} & set(finding) for finding in found["compat"])  # of no model
    assert {"dev", "recipe"} <= set(found["extras"])
    assert found["trimming"] == {"works": True, "problem": None}


def test_doctor_says_when_the_installed_transformers_cannot_be_trimmed(run, monkeypatch):
    def check():
        raise IncompatibleTransformersError("transformers 9 cannot be trimmed: no keywords.")

    monkeypatch.setattr(probe, "check_interface", check)
    problem = "transformers 9 cannot be trimmed: no keywords."
    assert run("doctor", "--json").json["trimming"] == {"works": False, "problem": problem}
    assert f"NO: {problem}" in run("doctor").stdout


def test_doctor_looks_at_a_model(run, checkpoint):
    found = run("doctor", "--model", checkpoint, "--device", "cpu", "--json").json
    assert not any(finding["open"] for finding in found["compat"])
    assert found["model"] == {
        "class": "MllamaForConditionalGeneration",
        "parameters": sum(parameter.numel() for parameter in tiny.build().parameters()),
        "dtype": "float32",
        "device": "cpu",
        "cross_attention_layers": list(tiny.CROSS_LAYERS),
        "features_per_image": tiny.FEATURES_PER_IMAGE,
    }


def test_people_read_the_same(run, checkpoint):
    text = run("doctor").stdout
    assert ["transformers", transformers.__version__] in [line.split() for line in text.splitlines()]
    for finding in crosstrim.compat.check():
        assert f"  {finding.name}: " in text
    assert "repaired on this model" in run("doctor", "--model", checkpoint).stdout


def test_an_extra_that_is_missing_is_told(run, monkeypatch):
    monkeypatch.setattr(environment, "_is_installed", lambda requirement: requirement.name != "scikit-image")
    assert environment.extras()["recipe"] is False
    text = run("doctor").stdout
    assert "not installed: pip install 'crosstrim[recipe]'" in text


def test_a_model_that_is_not_there_is_an_error(run):
    result = run("doctor", "--model", "./nowhere", "--json")
    assert (result.code, result.stdout) == (1, "")


def test_examples_are_listed_by_the_name_that_ask_takes(run, monkeypatch):
    questions = [{"question": "How many?", "answers": ["4"], "kind": "count"}]
    shipped = [{"image": "/a/digits.jpg", "layout": "2x2", "questions": questions}]
    monkeypatch.setattr(mini, "examples", lambda: shipped)
    assert run("examples", "--json").json == {"examples": [{"name": "digits", **shipped[0]}]}
    header, line = (line.split() for line in run("examples").stdout.splitlines())
    assert header == ["picture", "question", "answer"]
    assert line == ["digits", "How", "many?", "4"]
