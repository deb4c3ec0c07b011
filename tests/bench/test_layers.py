"""The suites measure what they say: right shapes, the same answers, every variant in its turn."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import crosstrim
from crosstrim import compat
from crosstrim.bench import layers, shapes
from crosstrim.bench.plain import plainly_trimmed
from crosstrim.bench.timing import Timing, alternate, inside

TINY = shapes.SHAPES["tiny"]


@pytest.fixture(scope="module")
def model():
    built = shapes.build(TINY)
    compat.apply(built)
    return built


def test_shapes_are_those_of_the_real_models():
    assert [shape.features_per_image for shape in shapes.SHAPES.values()] == [6404, 6404, 68]
    kv = {name: 2 * 2 * s.features_per_image * s.key_heads * s.hidden // s.heads * s.cross_layers / 2**20
          for name, s in shapes.SHAPES.items()}  # fmt: skip
    assert kv["11B"] == pytest.approx(200, rel=0.002)
    assert kv["90B"] == pytest.approx(500, rel=0.002)


def test_the_same_seed_builds_the_same_model_and_leaves_the_callers_random_state_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    again = shapes.build(TINY)
    assert torch.equal(torch.rand(1), expected)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name])


def test_prompts_show_each_sample_its_tiles_and_hide_them_from_the_rows_before_the_image():
    inputs = shapes.prompt(TINY, batch=2, rows=9, tiles=[1, 3])
    assert inputs["cross_attention_mask"][:, :4].sum() == 0
    assert inputs["cross_attention_mask"][:, 4:, 0].sum(-1).tolist() == [[1] * 5, [3] * 5]
    assert inputs["cross_attention_states"].shape == (8, 17, 64)


@pytest.mark.parametrize("tiles", [None, [1, 4]], ids=["rectangular", "ragged"])
def test_plain_trimming_gives_the_trimmed_models_logits(model, tiles):
    inputs = shapes.prompt(TINY, batch=2, rows=9, tiles=tiles)
    with torch.no_grad():
        untrimmed = model(**inputs).logits
        with crosstrim.trim(model, k=0.1) as trimmed:
            expected = both_passes(model, inputs)
            report = trimmed.report()
        with plainly_trimmed(model, report):
            plain = both_passes(model, inputs)
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=0)
    assert (untrimmed[:, -1] - expected[:, -2]).abs().max() > 1e-2


def both_passes(model, inputs):
    cache = DynamicCache(config=model.config.text_config)
    prompt = model(**inputs, past_key_values=cache).logits
    return torch.cat([prompt, model(**shapes.next_token(inputs, 9), past_key_values=cache).logits], dim=1)


def test_the_suite_has_a_row_for_everything_and_true_bytes():
    rows = layers.run(TINY, trims={"half": {"keep": 0.5}, "lossless": {}}, batch=2, rows=9, tiles=1, rounds=2)
    names = [(row["phase"], row["layer"], row["way"], row["trim"]) for row in rows]
    ways = [
        ("untrimmed", ""),
        ("plain", "half"),
        ("crosstrim", "half"),
        ("plain", "lossless"),
        ("crosstrim", "lossless"),
    ]
    layers_of = ("leader", "followers", "all")
    assert names == [(phase, layer, *way) for phase in ("prefill", "decode") for layer in layers_of for way in ways]
    kept = {"": 68, "half": 9, "lossless": 17}  # half of the one tile that is seen
    for row in rows:
        assert row["kv_bytes"] == 3 * 2 * 2 * 4 * kept[row["trim"]] * 8 * 4
        assert row["runs"] == 2
        assert row["ms"] > 0


def test_variants_take_turns_and_warm_ups_do_not_count():
    order = []

    def run(name):
        order.append(name)
        return float(len(order))

    measured = alternate({name: lambda name=name: run(name) for name in "ab"}, rounds=3, warm_up=1)
    assert order == list("abababab")
    assert measured == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}


def test_medians_and_spans_in_milliseconds():
    assert Timing.of([0.005, 0.001, 0.002, 0.003, 0.004, 0.006]).to_dict() == {
        "ms": 3.5,
        "ms_p20": 2.0,
        "ms_p80": 5.0,
        "runs": 6,
    }


def test_the_stopwatch_leaves_no_hook(model):
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with inside([model.lm_head]) as watch, torch.no_grad():
        model(**shapes.prompt(TINY, batch=1, rows=6))
    assert watch.seconds > 0
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before
