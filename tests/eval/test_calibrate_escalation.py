"""Budget and threshold are certified together: what is lost, what is made again, and what that costs."""

from __future__ import annotations

import pytest

import crosstrim
from crosstrim import TrimConfig
from crosstrim.asking import answering
from crosstrim.asking.escalation import attempts_of
from crosstrim.calibrated import read
from crosstrim.errors import CalibrationError, ConfigError
from crosstrim.eval import calibrate, calibrate_page, cost
from crosstrim.eval.rules import rules_of
from crosstrim.memory import LLAMA_11B
from crosstrim.models import mllama
from tests.support.questions import PICTURE

LEVELS = {"risk": 0.5, "confidence": 0.9}
KEEPS = [0.4, 0.1]


@pytest.fixture
def run(loaded, questions, tmp_path):
    def call(out="run.json", **options):
        options = {"keep": KEEPS, "batch_size": 3, "max_new_tokens": 2, **LEVELS, **options}
        return crosstrim.calibrate(*loaded, questions, tmp_path / out, **options)

    return call


def test_the_order_of_the_tests_is_fixed_beforehand():
    settings = calibrate.budgets(keep=[0.1, 0.5, 0.2])
    tested = [(rule.setting.config.keep, rule.below) for rule in rules_of(settings, [0.5, 0.9, 0.7, 0.9])]
    assert tested == [(0.5, 0.9), (0.2, 0.9), (0.1, 0.9), (0.1, 0.7), (0.1, 0.5)]
    assert [rule.below for rule in rules_of(settings)] == [None] * 3
    for wrong in (0, 1.5):
        with pytest.raises(ConfigError, match="escalate"):
            rules_of(settings, [wrong])
    with pytest.raises(ConfigError, match="drops nothing"):
        rules_of(calibrate.budgets(keep=[1.0, 0.5]), [0.9])


def test_what_is_made_again_is_not_lost(run, said, questions, loaded, tmp_path):
    otherwise, sure = said.otherwise, said.sure
    ids = [item.id for item in questions.items]
    otherwise |= {0.4: set(ids[:3]), 0.1: set(ids[:10])}
    sure |= dict.fromkeys(ids[:8], 0.6)  # two changed answers of 0.1 are sure
    result = run(escalate=[0.9, 0.5])
    rows = {row["label"]: row for row in result["curve"]}
    high, low, late = (
        rows[f"contribution keep={keep}, again below {below}"] for keep, below in ((0.4, 0.9), (0.1, 0.9), (0.1, 0.5))
    )
    assert [(row["lost"], row["escalated"], row["escalate"]) for row in (high, low, late)] == [
        (0, 8, 0.9),
        (2, 8, 0.9),
        (10, 0, 0.5),
    ]
    assert [row["certified"] for row in (high, low, late)] == [True, True, False]
    kept = result["predictions"]["contribution keep=0.1"]["kept"]
    shares = [one / seen for one, seen in zip(kept, result["visible"], strict=True)]
    assert low["kept_fraction"] == pytest.approx(sum(shares) / 12 + 8 / 12, abs=1e-6)
    assert low["kinds"]["count"]["escalated"] == sum(one.endswith("count") for one in ids[:8])
    assert result["chosen"]["escalate"] == 0.9
    assert result["chosen"]["label"] == low["label"]  # it keeps less than the other that is certified

    costs = cost.Costs.of(loaded[0])
    processor, features = loaded[1], mllama.locate(loaded[0]).geometry.features_per_image
    spent = whole = 0.0
    for place, item in enumerate(questions.items):
        prompt = len(
            processor.tokenizer(answering.chat_prompt(processor, item.question), add_special_tokens=False)[0]
        )
        alone = costs.flops(features, prompt, 2)
        spent += costs.flops(kept[place], prompt, 2) + alone * (place < 8)
        whole += alone
    assert low["cost"]["flops"] == pytest.approx(spent / whole, abs=1e-6)
    assert low["cost"]["kv_bytes"] == pytest.approx((sum(kept) / features + 8) / 12, abs=1e-6)

    page = calibrate_page.markdown(read(tmp_path / "run.json"))
    assert "| 66.7 |" in page  # made again, per cent
    assert f"keeps least is {low['label']}." in page


def test_the_one_that_keeps_least_of_those_certified_is_chosen(run, said, questions):
    sure = said.sure
    sure |= {item.id: 0.6 for item in questions.items[:8]}
    result = run(escalate=[0.9, 0.5])
    assert all(row["certified"] for row in result["curve"])
    assert result["chosen"]["escalate"] == 0.5


def test_a_test_that_is_lost_ends_the_smaller_budgets_too(run, said, questions):
    otherwise = said.otherwise
    otherwise |= {0.4: {item.id for item in questions.items}}
    result = run(escalate=[0.9, 0.5])
    assert result["chosen"] is None
    assert [row["asked"] for row in result["curve"]] == [6, 6, 6]  # of 12, two batches
    assert "again below 0.9" in result["refusal"]


def test_its_promise_holds_only_where_answers_are_made_again(run, said, questions, loaded, tmp_path):
    result = run(escalate=[0.9])
    config = TrimConfig.from_calibration(tmp_path / "run.json")
    assert (config.keep, config.escalate) == (result["chosen"]["config"]["keep"], 0.9)
    with pytest.raises(CalibrationError, match=r"lower probability than 0\.9"):
        crosstrim.trim(loaded[0], config)
    with pytest.raises(ConfigError, match="calibrated"):
        attempts_of(config, 0.5)
    first, escalation = attempts_of(config, None)
    assert (escalation.below, escalation.rungs) == (0.9, (None,))
    with crosstrim.trim(loaded[0], first):
        pass


def test_a_session_does_as_was_calibrated(run, loaded, tmp_path):
    run(escalate=[0.9, 0.5], risk=0.9)
    config = TrimConfig.from_calibration(tmp_path / "run.json")
    answer = crosstrim.Session(*loaded, PICTURE, config).ask("why?", max_new_tokens=2)
    assert answer.escalated  # a random model is sure of nothing
    assert answer.answer == crosstrim.Session(*loaded, PICTURE).ask("why?", max_new_tokens=2).answer


def test_operations_are_those_of_the_configuration(loaded):
    """By hand: a model of two layers, one of them cross-attention, would be too small to tell mistakes apart."""
    shape = LLAMA_11B
    costs = cost.Costs(shape, 7_000_000_000)
    rows, kept, kv = 110, 1000, 8 * 128
    by_hand = 2 * 7e9 * rows  # dense
    by_hand += 2 * 4096 * 2 * kv * (6404 + 7 * kept)  # keys and values
    by_hand += 4 * 4096 * (7 * rows * kept + 100 * 6404 + 10 * kept)  # attention to features
    by_hand += 4 * 4096 * 32 * sum(range(1, rows + 1))  # attention to text
    assert costs.flops(kept, 100, 10) == pytest.approx(by_hand)
    assert costs.kv_bytes(kept) == 1000 * 8 * 2 * kv * 2
    decoder = loaded[0].model.language_model
    counted = sum(
        module.weight.numel()
        for name, module in loaded[0].named_modules()
        if type(module).__name__ == "Linear" and ("layers" in name or name == "lm_head") and "vision" not in name
    ) - sum(
        getattr(decoder.layers[index].cross_attn, name).weight.numel()
        for index in mllama.locate(loaded[0]).layer_indices
        for name in ("k_proj", "v_proj")
    )
    assert cost.Costs.of(loaded[0]).token_parameters == counted
