"""vLLM with the plugin gives the tokens of crosstrim on transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support import vllm_runs as runs

pytestmark = pytest.mark.vllm


def test_a_mixed_batch_and_prompts_that_join_running_ones(start, mixed, expected, trim):
    engine = start(trim)
    assert engine.answer(mixed) == expected(**trim)
    assert engine.join_one_after_the_other(mixed) == expected(**trim)
    assert engine.free_blocks == engine.blocks


POLICIES = ["union", "contribution", "mmr", "dpp", "value", "mean", "random:3", "grid", "mass:0.9"]


def test_policies(start, mixed, expected, monkeypatch):
    """One engine for all: where the trim comes from, the next test says."""
    network, few = start({"keep": 0.2}).network, mixed[-6:]
    started_with, told = network.trim, {}
    for policy in POLICIES:
        config = replace(started_with.config, policy=policy)
        monkeypatch.setattr(network, "trim", replace(started_with, config=config))
        told[policy] = start({"keep": 0.2}).answer(few)
    assert told == {policy: expected(few, keep=0.2, policy=policy) for policy in POLICIES}
    assert len({str(tokens) for tokens in told.values()}) > len(POLICIES) // 2


def test_an_engine_takes_policy_and_rating_rows(start, mixed, expected):
    trim, few = {"keep": 0.2, "policy": "random:3", "rating_rows": "last_turn"}, mixed[-6:]
    engine = start(trim)
    answers, taken = engine.answer(few), engine.network.trim.config
    assert answers == expected(few, **trim)
    assert answers != expected(few, keep=0.2)
    assert (taken.keep, taken.policy, taken.rating_rows) == (0.2, "random:3", "last_turn")


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
