"""`crosstrim eval`: the numbers it reports, checked against asking one by one."""

from __future__ import annotations

import pytest

import crosstrim
from crosstrim import mini
from crosstrim.asking import answering
from crosstrim.asking.images import open_image
from crosstrim.eval import heldout


@pytest.fixture
def evaluate(run, checkpoint, questions):
    return lambda *arguments: run("eval", "--model", checkpoint, *arguments)


def one_by_one(checkpoint, questions, config):
    model, processor = crosstrim.load(checkpoint)
    for question in questions:
        picture = open_image(question["image"])
        yield answering.ask(
            model, processor, picture, question["question"], config, max_new_tokens=heldout.MAX_NEW_TOKENS
        )


def test_numbers_are_those_of_asking_one_by_one(evaluate, checkpoint, questions):
    config = crosstrim.TrimConfig(k=0.1)
    untrimmed = [answer.answer for answer in one_by_one(checkpoint, questions, None)]
    trimmed = list(one_by_one(checkpoint, questions, config))
    # Half of the questions are right by definition, so that accuracy is a number between 0 and 1.
    for number, (question, answer) in enumerate(zip(questions, untrimmed, strict=True)):
        question["answers"] = [answer] if number % 2 else ["never said"]
    for batch_size in (5, 64):
        result = evaluate("--k", 0.1, "--batch-size", batch_size, "--json").json
        check_numbers(result, questions, untrimmed, trimmed)


def check_numbers(result, questions, untrimmed, trimmed):
    kinds = {question["kind"] for question in questions}
    for kind in kinds:
        of_kind = [number for number, question in enumerate(questions) if question["kind"] == kind]

        def mean(values, chosen=of_kind):
            return pytest.approx(sum(values[number] for number in chosen) / len(chosen), abs=1e-4)

        right = [text in question["answers"] for text, question in zip(untrimmed, questions, strict=True)]
        assert result["untrimmed"]["accuracy"]["kinds"][kind] == mean(right)
        right = [one.answer in question["answers"] for one, question in zip(trimmed, questions, strict=True)]
        assert result["trimmed"]["accuracy"]["kinds"][kind] == mean(right)
        assert result["trimmed"]["kept_fraction"]["kinds"][kind] == mean(
            [one.report.kept_fraction for one in trimmed]
        )
    assert result["untrimmed"]["accuracy"]["overall"] == 0.5
    overall = sum(one.report.kept_fraction for one in trimmed) / len(trimmed)
    assert result["trimmed"]["kept_fraction"]["overall"] == pytest.approx(overall, abs=1e-4)
    assert set(result["untrimmed"]["kept_fraction"]["kinds"].values()) == {1.0}


def test_json_says_what_the_numbers_depend_on(evaluate, checkpoint):
    result = evaluate("--json")
    assert set(result.json) == {
        *("model", "benchmark", "quick", "questions", "questions_per_kind", "layouts", "untrimmed", "trimmed"),
        *("config", "generation", "dtype", "quantization", "versions", "compat"),
    }
    found = result.json
    assert found["model"] == str(checkpoint)
    assert (found["quick"], found["questions"], found["questions_per_kind"]) == (
        False,
        18,
        {"count": 6, "read": 6, "where": 6},
    )
    assert found["layouts"] == ["1x1", "1x2"]
    assert found["config"] == crosstrim.TrimConfig(k=0.25).to_dict()
    assert found["generation"] == {"max_new_tokens": heldout.MAX_NEW_TOKENS, "do_sample": False, "batch_size": 64}
    assert found["dtype"] == "float32"
    assert set(found["versions"]) == {"crosstrim", "transformers", "torch", "python", "device"}
    assert all(found["compat"].values())
    assert found["trimmed"]["seconds"] > 0


def test_quick_asks_equally_of_every_kind_and_layout(evaluate, questions, monkeypatch):
    monkeypatch.setattr(mini, "QUICK", 2)
    found = evaluate("--quick", "--json").json
    assert found["quick"] is True
    assert found["questions"] == mini.QUICK * 3 * 2
    assert set(found["questions_per_kind"].values()) == {mini.QUICK * 2}
    cells = [(one["kind"], one["layout"]) for one in mini.select(questions, quick=True)]
    assert {cells.count(cell) for cell in cells} == {mini.QUICK}


def test_layers_that_read_less_keep_less(evaluate, checkpoint, questions):
    config = crosstrim.TrimConfig(keep=0.5, policy="pyramid:0.2")
    kept = [answer.report.kept_fraction for answer in one_by_one(checkpoint, questions, config)]
    found = evaluate("--keep", 0.5, "--policy", "pyramid:0.2", "--json").json
    assert found["trimmed"]["kept_fraction"]["overall"] == pytest.approx(sum(kept) / len(kept), abs=1e-4)
    assert found["trimmed"]["kept_fraction"]["overall"] < 0.45  # of 51.5 % that were chosen


def test_lossless_loses_nothing(evaluate):
    found = evaluate("--lossless", "--json").json
    assert found["trimmed"]["accuracy"] == found["untrimmed"]["accuracy"]
    assert found["trimmed"]["kept_fraction"] == found["untrimmed"]["kept_fraction"]


def test_people_read_a_table_without_progress_in_it(evaluate):
    result = evaluate("--keep", "0.5")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["kind", "questions", "untrimmed", "trimmed", "kept"]
    assert [line[0] for line in lines[1:]] == ["count", "read", "where", "overall"]
    assert lines[-1][1] == "18"
    assert lines[-1][-1] == "51.5%"  # 9 of 17 and 17 of 34
    assert "questions" not in "".join(result.stdout.splitlines()[1:])


def test_pictures_are_encoded_once(checkpoint, questions, monkeypatch):
    model, processor = crosstrim.load(checkpoint)
    encoded = []
    model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    steps = []
    heldout.evaluate(model, processor, crosstrim.TrimConfig(), progress=lambda *step: steps.append(step))
    assert sum(encoded) == len({question["image"] for question in questions})
    assert steps == [(0, 18), (18, 18)]


def test_a_failure_leaves_the_model_as_it_was(checkpoint, questions, monkeypatch):
    model, processor = crosstrim.load(checkpoint)
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        heldout.evaluate(model, processor, crosstrim.TrimConfig())
    after = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert after == before
