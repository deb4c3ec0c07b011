"""What the embedded model can do, from the command line: it needs the trained checkpoint."""

from __future__ import annotations

import pytest
from safetensors import safe_open

import crosstrim
from crosstrim import mini
from crosstrim.asking.images import find, open_image

pytestmark = pytest.mark.usefixtures("trained")


def test_it_is_stored_in_half_and_runs_in_full_precision(trained):
    with safe_open(trained / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    assert str(crosstrim.load()[0].dtype) == "torch.float32"


def test_examples_open_by_the_names_that_are_listed(run):
    listed = run("examples", "--json").json["examples"]
    assert len(listed) >= 3
    assert find("example") == listed[0]["image"]
    for example in listed:
        assert find(example["name"]) == example["image"]
        assert min(open_image(example["image"]).size) > 100
        assert all(asked["answers"] for asked in example["questions"])


def test_most_questions_about_the_examples_are_answered_rightly(run):
    asked = [
        (example["name"], question)
        for example in run("examples", "--json").json["examples"]
        for question in example["questions"][:3]
    ]
    right = 0
    for name, question in asked:
        found = run("ask", name, question["question"], "--json").json
        (image,) = found["report"]["samples"][0]["images"]
        assert image["kept"] < image["visible"]
        right += found["answer"] in question["answers"]
    assert right >= 0.7 * len(asked)


def test_a_lossless_trim_of_an_example_changes_nothing(run):
    example = run("examples", "--json").json["examples"][0]
    for question in example["questions"][:2]:
        found = run("ask", example["name"], question["question"], "--lossless", "--compare", "--json").json
        assert found["answer"] == found["untrimmed"]["answer"]


def test_a_quick_benchmark_takes_less_than_a_minute_and_keeps_accuracy(run):
    result = run("eval", "--quick", "--json")
    assert (result.code, result.stderr) == (0, "")
    found = result.json
    kinds = {question["kind"] for question in mini.heldout()}
    assert found["questions"] == mini.QUICK * len(kinds) * len(found["layouts"])
    assert len(found["layouts"]) == 8
    assert set(found["questions_per_kind"].values()) == {mini.QUICK * 8}
    assert found["untrimmed"]["accuracy"]["overall"] > 0.7
    assert found["trimmed"]["accuracy"]["overall"] > found["untrimmed"]["accuracy"]["overall"] - 0.1
    assert 0.1 < found["trimmed"]["kept_fraction"]["overall"] < 0.95
