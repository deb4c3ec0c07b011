"""A calibration from end to end on the tiny model: what is counted, what is stopped, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import crosstrim
from crosstrim import TrimConfig
from crosstrim.asking import answering
from crosstrim.calibrated import read
from crosstrim.errors import CalibrationError, ConfigError, DatasetError, ResultError
from crosstrim.eval import calibrate, risk, sweep
from crosstrim.models import compat
from tests.support.questions import write_pictures

LEVELS = {"risk": 0.5, "confidence": 0.9}
KEEPS = [1.0, 0.4, 0.1]


@pytest.fixture
def run(loaded, questions, tmp_path):
    def call(out="run.json", data=questions, **options):
        options = {"keep": KEEPS, "batch_size": 3, "max_new_tokens": 2, **LEVELS, **options}
        return crosstrim.calibrate(*loaded, data, tmp_path / out, **options)

    return call


def test_the_smallest_budget_that_passes_is_chosen(run, said, questions, tmp_path):
    otherwise = said.otherwise
    ids = [item.id for item in questions.items]
    otherwise |= {0.4: set(ids[:2]), 0.1: set(ids)}
    result = run()
    assert result == json.loads((tmp_path / "run.json").read_text()) == read(tmp_path / "run.json")
    assert [row["label"] for row in result["curve"]] == [f"contribution keep={keep}" for keep in KEEPS]
    assert [row["certified"] for row in result["curve"]] == [True, True, False]
    assert result["chosen"]["label"] == "contribution keep=0.4"
    assert result["refusal"] is None
    row = result["curve"][1]
    assert (row["questions"], row["asked"], row["lost"]) == (12, 12, 2)
    assert (row["low"], row["high"]) == risk.interval(2, 2, 12, 0.9)
    assert risk.tail(2, 12, row["bound"]) == pytest.approx(0.1)
    assert sum(kind["lost"] for kind in row["kinds"].values()) == 2
    assert result["predictions"]["contribution keep=0.4"]["lost"] == [True] * 2 + [False] * 10
    assert not list(tmp_path.glob("*.journal"))


def test_a_lost_test_ends_it_and_the_smaller_ones(run, said, questions):
    otherwise, batches = said.otherwise, said.batches
    ids = [item.id for item in questions.items]
    assert risk.allowed(12, 0.5, 0.9) == 3
    otherwise[0.4] = set(ids[:4])
    result = run()
    assert [row["asked"] for row in result["curve"]] == [12, 6, 6]  # the fourth change is in the second batch
    assert [row["certified"] for row in result["curve"]] == [True, False, False]  # though 0.1 changed nothing
    assert len(batches) == 4
    stopped = result["curve"][2]
    assert (stopped["low"], stopped["high"]) == risk.interval(0, 6, 12, 0.9)


def test_where_none_passes_it_says_what_could(run, said, questions, tmp_path):
    otherwise, batches = said.otherwise, said.batches
    otherwise[1.0] = {item.id for item in questions.items[:5]}
    result = run()
    assert len(batches) == 2  # nothing is left to ask
    assert result["chosen"] is None
    assert result["refusal"].startswith("the largest budget, contribution keep=1.0, lost 5 of 6 answers; for a risk")
    assert "it may lose 3 of 12. Give a larger budget, or allow a higher risk." in result["refusal"]
    with pytest.raises(CalibrationError, match=r"run\.json chose no budget: the largest budget, contribution keep=1"):
        TrimConfig.from_calibration(tmp_path / "run.json")


def test_a_rate_below_the_risk_says_how_many_questions_would_do(run, said, questions):
    otherwise = said.otherwise
    otherwise[1.0] = {item.id for item in questions.items[::3]}
    result = run(batch_size=12)
    count = risk.needed_at(4 / 12, 0.5, 0.9)
    assert f"about {count} questions would support the claim" in result["refusal"]


def test_wrong_counts_only_what_was_right(run, said, questions):
    otherwise = said.otherwise
    first = questions.items[0].id
    otherwise |= {None: {first}, 1.0: {first}}  # "?" is right: wrong before and after, then right after
    result = run(loss="wrong")
    assert [row["lost"] for row in result["curve"]] == [0, 0, 0]
    assert [row["lost"] for row in run("other.json")["curve"]] == [0, 1, 1]


def test_after_an_interruption_nothing_is_asked_twice(run, said, questions, tmp_path, monkeypatch):
    otherwise, batches = said.otherwise, said.batches
    otherwise[0.4] = {item.id for item in questions.items[:4]}
    expected = run("other.json")
    batches.clear()
    watched = sweep.Answerer.answer

    def interrupted(self, batch):
        if len(batches) == 3:
            raise KeyboardInterrupt
        return watched(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.Answerer, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    told = []
    found = run(progress=lambda done, total: told.append((done, total)))
    assert found == expected
    assert len(batches) == 4
    assert told[-1][0] == told[-1][1]
    again = run()
    assert again == expected
    assert len(batches) == 4
    with pytest.raises(ResultError, match=r"other calibration\.risk \(0\.5 there, 0\.4 here\)"):
        run(risk=0.4)


def test_progress_counts_what_is_no_longer_needed_as_done(run, said, questions):
    otherwise = said.otherwise
    otherwise[0.4] = {item.id for item in questions.items[:4]}
    told = []
    run(progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (48, 48)
    assert told == sorted(told)


def test_questions_are_drawn_with_a_seed(questions):
    first = calibrate.draw(questions, 6, 0)
    assert first == calibrate.draw(questions, 6, 0) != calibrate.draw(questions, 6, 1)
    assert [item for item in questions.items if item in first.items] == list(first.items)
    assert len(first.items) == 6
    assert calibrate.draw(questions, None, 0) == questions
    with pytest.raises(DatasetError, match="has 12 questions and 13 are to be drawn"):
        calibrate.draw(questions, 13, 0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"risk": 0.05, "confidence": 0.95}, CalibrationError, "12 questions cannot .*: that needs at least 59"),
        ({"risk": 0}, ConfigError, "risk=0 must lie between 0 and 1"),
        ({"loss": "kl"}, ConfigError, "loss='kl' must be one of 'answer', 'wrong'"),
        ({"k": [0.1]}, ConfigError, "no common order"),
        ({"keep": [0.5, 8]}, ConfigError, "has shares and numbers of features"),
        ({"keep": [2.5]}, ConfigError, "keep=2.5"),
        ({"policy": "oracle"}, ConfigError, "oracle"),
    ],
)
def test_refusals_come_before_any_question_is_asked(run, said, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        run(**options)
    assert said.batches == []
    assert not list(tmp_path.iterdir())


def test_a_folder_of_pictures_needs_only_a_question(loaded, said, tmp_path):
    write_pictures(tmp_path / "pictures")
    options = {"keep": [1.0], "risk": 0.5, "confidence": 0.9, "question": "what is it?", "max_new_tokens": 2}
    result = crosstrim.calibrate(*loaded, tmp_path / "pictures", tmp_path / "run.json", **options)
    assert [item["question"] for item in result["items"]] == ["what is it?"] * 4
    assert result["chosen"]["label"] == "contribution keep=1.0"
    assert result["model"]["name"] == loaded[0].name_or_path


def test_wrong_needs_answers(run, questions):
    bare = replace(questions, items=tuple(replace(item, answers=()) for item in questions.items))
    with pytest.raises(DatasetError, match="without answers, which loss='wrong' needs"):
        run(data=bare, loss="wrong")


def test_budgets_come_largest_first():
    found = calibrate.budgets(k=[0.1, 0.5, 0.1], k_base="all", kv_dtype="int8")
    assert [one.config for one in found] == [TrimConfig(k=k, k_base="all", kv_dtype="int8") for k in (0.5, 0.1)]
    assert [one.config.keep for one in calibrate.budgets(keep=[8, 64])] == [64, 8]
    assert [one.config.keep for one in calibrate.budgets()] == [0.5, 0.35, 0.2, 0.1, 0.05]


@pytest.fixture
def calibrated(run, said, tmp_path):
    run(rating_rows="last_turn")
    return TrimConfig.from_calibration(tmp_path / "run.json")


def test_a_calibrated_config_trims_the_model_it_was_made_with(calibrated, loaded):
    model, processor = loaded
    assert calibrated.to_dict() == read_back(calibrated)
    assert (calibrated.keep, calibrated.policy, calibrated.rating_rows) == (0.1, "contribution", "last_turn")
    for config in (calibrated, answering.for_tokenizer(calibrated, processor.tokenizer)):
        with crosstrim.trim(model, config) as trimmed:
            assert trimmed.config.keep == 0.1


def test_a_calibration_that_is_older_than_an_option_had_its_default(calibrated, loaded, tmp_path):
    written = json.loads((tmp_path / "run.json").read_text())
    del written["chosen"]["config"]["merge"]
    (tmp_path / "older.json").write_text(json.dumps(written))
    older = TrimConfig.from_calibration(tmp_path / "older.json")
    crosstrim.trim(loaded[0], older).remove()
    with pytest.raises(CalibrationError, match=r"merge \(False there, True here\)"):
        crosstrim.trim(loaded[0], replace(older, merge=True))


def read_back(config):
    return TrimConfig.from_dict(config.to_dict()).to_dict()


def test_it_refuses_everything_else_by_name(calibrated, checkpoint):
    model, _ = crosstrim.load(checkpoint)
    with pytest.raises(
        CalibrationError, match=r"run\.json does not hold for this trim: keep \(0\.1 there, 0\.05 here\)"
    ):
        crosstrim.trim(model, replace(calibrated, keep=0.05))
    with pytest.raises(CalibrationError, match=r"policy \(contribution there, union here\)"):
        crosstrim.trim(model, replace(calibrated, policy="union"))
    crosstrim.trim(model, calibrated).remove()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(CalibrationError, match="weights"):
        crosstrim.trim(model, calibrated)
    other, _ = crosstrim.load(checkpoint, dtype="bfloat16")
    with pytest.raises(CalibrationError, match=r"dtype \(float32 there, bfloat16 here\); load the model in float32"):
        crosstrim.trim(other, calibrated)


def test_it_refuses_other_repairs(calibrated, checkpoint):
    made_with = {**calibrated.made_with, "compat": dict.fromkeys(calibrated.made_with["compat"], False)}
    model, _ = crosstrim.load(checkpoint)
    on = next(finding.name for finding in compat.check(model) if finding.repaired)
    with pytest.raises(CalibrationError, match=rf"repair {on} \(off there, on here\)"):
        crosstrim.trim(model, replace(calibrated, made_with=made_with))


def test_files_that_are_no_calibration(tmp_path):
    with pytest.raises(ResultError, match="cannot be read"):
        TrimConfig.from_calibration(tmp_path / "none.json")
    path = tmp_path / "other.json"
    for content, words in [("{", "is no JSON"), ('{"summary": []}', "is no result of crosstrim calibrate")]:
        path.write_text(content)
        with pytest.raises(ResultError, match=words):
            TrimConfig.from_calibration(path)
    path.write_text('{"format": 9, "calibration": {}, "curve": []}')
    with pytest.raises(ResultError, match="has format 9, this crosstrim reads 1"):
        TrimConfig.from_calibration(path)
