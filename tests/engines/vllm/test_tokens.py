"""vLLM with the plugin gives the tokens of crosstrim on transformers."""

from __future__ import annotations

import pytest

from tests.support import vllm_runs as runs

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("trim", [{}, {"keep": 0.3}, {"keep": 40}], ids=str)
def test_a_mixed_batch_and_prompts_that_join_running_ones(start, mixed, expected, trim):
    engine = start(trim)
    assert engine.answer(mixed) == expected(**trim)
    assert engine.join_one_after_the_other(mixed) == expected(**trim)
    assert engine.free_blocks == engine.blocks


POLICIES = ["union", "contribution", "mmr", "dpp", "value", "mean", "random:3", "grid", "mass:0.9"]


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(start, mixed, expected, policy):
    trim, few = {"keep": 0.2, "policy": policy}, mixed[-6:]
    assert start(trim).answer(few) == expected(few, **trim)


def test_rows_that_rate(start, mixed, expected):
    trim, few = {"keep": 0.2, "rating_rows": "last_turn"}, mixed[-6:]
    assert start(trim).answer(few) == expected(few, **trim)


def test_another_budget_for_each_request(start, model, processor):
    row = runs.rows_of("2x2")[5]
    budgets = [0.5, 40, None, 0.1, 1.0]
    asked = [
        runs.request(processor, row["question"], [row["image"]], 12, {"crosstrim": {"keep": keep}})
        for keep in budgets
    ]
    plain = runs.request(processor, row["question"], [row["image"]], 12)
    engine = start({"keep": 0.3})
    wanted = [runs.reference(model, processor, [plain], keep=keep)[0] for keep in [*budgets, 0.3]]
    assert engine.answer([*asked, plain]) == wanted
    assert list(engine.cross_blocks.values()) == [5, 2, 9, 1, 9, 3]
