"""`--quantize` on every verb that loads a model."""

from __future__ import annotations

import pytest
import typer

from crosstrim.asking import loading
from crosstrim.batch import answerer
from crosstrim.cli import options
from crosstrim.cli.program import app
from crosstrim.models import quantised
from crosstrim.server import local

COMMANDS = typer.main.get_command(app).commands
needs_bitsandbytes = pytest.mark.skipif(not quantised.versions().get("bitsandbytes"), reason="needs bitsandbytes")


def test_every_verb_that_loads_a_model_can_quantise_it():
    takes = {name: {one.name for one in command.params} for name, command in COMMANDS.items()}
    assert {name for name, params in takes.items() if "dtype" in params} == {
        name for name, params in takes.items() if "quantize" in params
    }
    assert {"ask", "batch", "serve", "eval", "calibrate", "analyze", "doctor"} <= {
        name for name, params in takes.items() if "quantize" in params
    }


@pytest.mark.parametrize(
    "verb",
    [
        ("ask", "example", "what?"),
        ("analyze", "example", "what?"),
        ("eval", "--quick"),
        ("doctor", "--model", "mini"),
        ("calibrate", "--out", "{folder}/c.json"),
        ("batch", "{pictures}", "{folder}/out.jsonl", "--question", "what?"),
        ("serve", "--port", "0"),
    ],
    ids=lambda verb: verb[0],
)
def test_it_reaches_the_model(run, picture, tmp_path, monkeypatch, verb):
    class Asked(Exception):
        pass

    def load(model, **given):
        raise Asked(given["quantization"])

    for module in (loading, answerer, local):
        monkeypatch.setattr(module, "load", load)
    typed = [part.format(folder=tmp_path, pictures=picture.parent) for part in verb]
    with pytest.raises(Asked, match="fp8"):
        run(*typed, "--quantize", "fp8")


@pytest.mark.parametrize(
    "verb", [("ask", "example", "what?"), ("doctor", "--model", "mini")], ids=lambda verb: verb[0]
)
def test_a_format_that_is_none_is_wrong_usage(run, verb):
    result = run(*verb, "--quantize", "int4")
    assert (result.code, result.stdout) == (2, "")
    assert "quantization='int4' must be one of nf4, int8, fp8." in result.stderr


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_missing_library_ends_with_one_line(run, monkeypatch, name):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda _name: None)
    result = run("ask", "example", "what?", "--quantize", name)
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("is not installed: pip install 'crosstrim[quant]'.\n")


@needs_bitsandbytes
def test_doctor_says_what_the_weights_are(run, checkpoint):
    whole = run("doctor", "--model", checkpoint, "--device", "cpu", "--json").json["model"]
    found = run("doctor", "--model", checkpoint, "--device", "cpu", "--quantize", "nf4", "--json").json["model"]
    assert (whole["quantization"], found["quantization"]) == (None, "nf4")
    assert found["parameters"] == whole["parameters"]


@needs_bitsandbytes
def test_a_batch_of_another_precision_does_not_go_on(run, checkpoint, picture, tmp_path):
    command = ["batch", picture.parent, tmp_path / "out.jsonl", "--question", "what?", "--model", checkpoint]
    command += ["--device", "cpu", "--max-new-tokens", "2"]
    assert run(*command, "--quantize", "nf4").code == 0
    result = run(*command, "--resume")
    assert result.code == 1
    assert "model" in result.stderr


def test_the_option_names_the_formats_that_load_takes():
    (option,) = (one for one in COMMANDS["ask"].params if one.name == "quantize")
    assert option.metavar.split("|") == list(options.WEIGHT_BITS)
