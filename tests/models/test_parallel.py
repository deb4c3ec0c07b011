"""One model in two processes answers and keeps what one process does."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import crosstrim
from crosstrim.errors import ConfigError, MissingExtraError, UnsupportedModelError
from crosstrim.models import mllama, parallel
from tests.support import parallel_worker, tiny


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    # As torchrun starts them, but forked, with what is imported here.
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="fork",
        log_line_prefix_template="",
    )
    elastic_launch(settings, parallel_worker.main)(str(checkpoint), folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
class TestTwoProcesses:
    def test_each_holds_half_of_the_heads(self, found, model):
        assert [one["heads"] for one in found] == [4, 4]
        whole = sum(one.numel() for one in model.model.language_model.parameters())
        assert all(one["weights"] < sum(p.numel() for p in model.parameters()) - 0.45 * whole for one in found)

    def test_tokens_and_kept_features_are_those_of_one_process(self, found, checkpoint):
        expected = json.loads(json.dumps(parallel_worker.answers(crosstrim.load(checkpoint)[0])))
        for one in found:
            for name, answer in expected.items():
                assert one["answers"][name] == answer, name
        kept = [answer[1] for name, answer in expected.items() if name not in ("untrimmed", "lossless")]
        assert len({json.dumps(one) for one in kept}) > len(kept) // 2  # the settings are not all alike

    def test_mini_answers_alike(self, found):
        expected = json.loads(json.dumps(parallel_worker.answers_of_mini()))
        assert [one["mini"] for one in found] == [expected, expected]

    def test_a_policy_of_many_minds_keeps_the_same_in_both(self, found):
        assert found[0]["capricious"] == found[1]["capricious"]

    def test_analysis_scores_all_heads(self, found, model):
        for one in found:
            torch.testing.assert_close(torch.tensor(one["scores"]), parallel_worker.scores(model))

    def test_heads_that_do_not_add_up_are_refused(self, found):
        words = "holds 4 of 8 query heads and 1 of 4 key/value heads, and its weights do not tell which processes"
        assert all(words in one["refusal"] for one in found)


def test_the_plan_divides_every_projection_of_the_text_and_nothing_else(model):
    plan = parallel.plan()
    named = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    generic = {name: ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in named}
    text = {name for name in named if name.startswith(("model.language_model.", "lm_head"))}
    assert {generic[name] for name in text} == set(plan)
    assert not {generic[name] for name in named.keys() - text} & set(plan)


def test_one_process_has_all_heads(model):
    parallel.count_own_heads(model)
    attention = mllama.locate(model).leader.cross_attn
    assert (attention.num_heads, attention.num_key_value_heads) == (8, 4)
    assert parallel.ranks(mllama.locate(model)) is None


def test_heads_that_nobody_knows_of_are_refused_before_anything_is_hooked(model):
    attention = mllama.locate(model).leader.cross_attn
    attention.num_heads, attention.num_key_value_heads = 4, 2
    with pytest.raises(UnsupportedModelError, match=r"holds 4 of 8 query heads.*crosstrim.load\(\.\.\., tp=\.\.\.\)"):
        crosstrim.trim(model, k=0.5)
    attention.num_heads, attention.num_key_value_heads = 8, 4
    crosstrim.trim(model, k=0.5).remove()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"tp": 3},
            "tp=3 does not divide this model's 8 query heads, 4 key/value heads, 96 dimensions inside the MLP",
        ),
        ({"tp": 3}, "; take one of 1, 2, 4."),
        ({"tp": 8}, "take one of 1, 2, 4."),
        ({"tp": 2}, "tp=2 needs 2 processes and this run has 1; start it with `torchrun --nproc-per-node 2"),
        ({"tp": 0}, "tp=0 must be a number of processes, 1 or more."),
        ({"tp": True}, "tp=True must be a number of processes"),
        ({"tp": 2, "device_map": "cpu"}, "leave device_map='cpu' out, or tp."),
        (
            {"tp": 2, "quantization_config": {}},
            "tp=2 divides weights that are not quantised; leave the quantization out, or tp.",
        ),
    ],
)
def test_what_cannot_be_divided(checkpoint, monkeypatch, options, words):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError) as caught:
        crosstrim.load(checkpoint, **options)
    assert words in str(caught.value)


def test_dividing_needs_accelerate(checkpoint, monkeypatch):
    monkeypatch.setattr(crosstrim.asking.loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match="tp=2 needs accelerate, which is not installed: pip install accelerate"
    ):
        crosstrim.load(checkpoint, tp=2)


def test_the_published_models_divide_over_eight(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = tiny.config()
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 64, 8
    config.text_config.intermediate_size = 28672
    assert parallel.division(config, 8).tp_size == 8
