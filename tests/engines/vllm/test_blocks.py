"""How many blocks requests take, read from vLLM's scheduler."""

from __future__ import annotations

import pytest

from tests.support import vllm_runs as runs

pytestmark = pytest.mark.vllm

BLOCKS = {"{}": [9, 3, 0], "{'keep': 0.3}": [3, 1, 0], "{'keep': 40}": [2, 2, 0]}
"""Of 32 slots: four tiles, one tile, text."""


def test_what_is_kept_takes_blocks_and_nothing_else(start, trim, mixed):
    engine = start(trim)
    engine.answer([mixed[0], mixed[1], mixed[3]])
    assert list(engine.cross_blocks.values()) == BLOCKS[str(trim)]
    assert engine.free_blocks == engine.blocks


def test_requests_in_flight_in_ninety_blocks(start, processor):
    """An engine counts what a request keeps as it counts what it would keep by itself."""
    engine, in_flight = start({"keep": 0.3}, num_gpu_blocks_override=90), {}
    for keep in (None, 0.3, 40):
        engine.forget()
        engine.answer(
            [
                runs.request(processor, row["question"], [row["image"]], 6, {"crosstrim": {"keep": keep}})
                for row in runs.rows_of("2x2")[:26]
            ]
        )
        in_flight[keep] = engine.most_in_flight
        assert engine.free_blocks == engine.blocks
    assert in_flight == {None: 8, 0.3: 17, 40: 22}
    assert in_flight[0.3] >= 2 * in_flight[None]


def test_vllm_plans_with_what_is_kept(start, trim):
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget
    from vllm.v1.kv_cache_interface import CrossAttentionSpec

    kept = {None: 260, 0.3: 78, 40: 40}[trim.get("keep")]
    config = start(trim).llm.llm_engine.vllm_config
    assert MultiModalBudget(config, MULTIMODAL_REGISTRY).mm_max_toks_per_item == {"image": kept}
    layers = config.compilation_config.static_forward_context.values()
    (size,) = {
        spec.max_memory_usage_bytes(config) // spec.page_size_bytes
        for spec in (layer.get_kv_cache_spec(config) for layer in layers)
        if isinstance(spec, CrossAttentionSpec)
    }
    assert size == -(-kept // runs.BLOCK)


def test_a_request_that_would_never_fit_is_ended_and_the_others_answered(start, mixed, expected):
    engine = start({"keep": 40}, num_gpu_blocks_override=12, max_model_len=128)
    large = runs.Request(mixed[0].ids, mixed[0].images, 60, {"crosstrim": {"keep": None}})
    answers = engine.answer([mixed[0], large, mixed[1]])
    assert engine.finished[1].outputs[0].finish_reason == "error"
    wanted = expected(mixed[:2], keep=40)
    assert [answers[0], answers[2]] == wanted
