"""`crosstrim doctor` and `crosstrim examples`."""

from __future__ import annotations

import platform

import pytest
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
        "quantization": None,
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


IN_FLIGHT = {"untrimmed": 6404, "one tile, padding gone": 1601, "keep=0.5": 3202, "keep=0.25": 1601}


def test_what_fits_on_a_card(run):
    """By the formulas of docs/scaling.md, with the published numbers."""
    (found,) = run("doctor", "--card", "12", "--shape", "11b", "--json").json["models"]
    assert (found["card_gb"], found["reserve"], found["text_tokens"]) == (12, 0.1, 512)
    whole, matrices = 10_670_220_835, 8_698_986_496
    for row, bits in zip(found["rows"], (16, 8, 4 + 8 / 64 + 32 / 16384), strict=True):
        weights = 2 * (whole - matrices) + matrices * bits / 8
        assert row["weight_bytes"] == pytest.approx(weights, abs=1)
        for tier, features in IN_FLIGHT.items():
            fits = (12e9 * 0.9 - weights) // ((features * 8 + 512 * 32) * 4096)
            assert row["in_flight"][tier] == (fits if weights <= 10.8e9 else None)
    assert [row["weights"] for row in found["rows"]] == ["bf16", "int8 or fp8", "nf4"]
    assert found["rows"][0]["in_flight"]["untrimmed"] is None
    assert found["rows"][2]["in_flight"]["untrimmed"] > 0


def test_what_fits_is_computed_from_a_configuration_alone(run, tmp_path):
    config = tiny.config(torch.float32)
    config.save_pretrained(tmp_path)
    (found,) = run("doctor", "--card", "24", "--model", tmp_path, "--json").json["models"]
    model = tiny.build()
    parameters = sum(one.numel() for one in model.parameters())
    assert found["model"] == str(tmp_path)
    assert found["rows"][0]["weight_bytes"] == 2 * parameters
    leader = model.model.language_model.layers[tiny.CROSS_LAYERS[0]].cross_attn
    left = [leader.q_proj, leader.k_proj, leader.v_proj]
    matrices = [one for one in model.model.language_model.modules() if isinstance(one, torch.nn.Linear)]
    smaller = sum(one.weight.numel() for one in matrices if not any(one is other for other in left))
    assert found["rows"][1]["weight_bytes"] == 2 * parameters - smaller
    text = run("doctor", "--card", "24", "--model", tmp_path).stdout
    assert "Computed, not measured" in text


def test_what_fits_of_both_shapes_without_a_model(run):
    text = run("doctor", "--card", "24").stdout
    assert text.index("Llama-3.2-11B") < text.index("Llama-3.2-90B")
    assert ["nf4", "50.3", "GB", "-", "-", "-", "-"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--card", "24", "--quantize", "nf4"], "--quantize has no effect with --card"),
        (["--card", "24", "--shape", "7b"], "--shape 7b must be one of 11b, 90b."),
        (["--card", "24", "--shape", "11b", "--model", "mini"], "--model and --shape are two models"),
        (["--shape", "11b"], "--shape goes with --card GB."),
        (["--card", "0"], "greater than or equal to 1"),
    ],
)
def test_what_fits_refuses(run, wrong, words):
    result = run("doctor", *wrong)
    assert (result.code, result.stdout) == (2, "")
    assert words in result.stderr


def test_examples_are_listed_by_the_name_that_ask_takes(run, monkeypatch):
    questions = [{"question": "How many?", "answers": ["4"], "kind": "count"}]
    shipped = [{"image": "/a/digits.jpg", "layout": "2x2", "questions": questions}]
    monkeypatch.setattr(mini, "examples", lambda: shipped)
    assert run("examples", "--json").json == {"examples": [{"name": "digits", **shipped[0]}]}
    header, line = (line.split() for line in run("examples").stdout.splitlines())
    assert header == ["picture", "question", "answer"]
    assert line == ["digits", "How", "many?", "4"]
