"""The suites measure what they say: right shapes, the same answers, every variant in its turn."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import DynamicCache

import crosstrim
from crosstrim.bench import layers, shapes
from crosstrim.bench.overhead import inside_hooks
from crosstrim.bench.plain import plainly_trimmed
from crosstrim.bench.timing import Timing, alternate, inside
from crosstrim.method import attention
from crosstrim.models import compat

TINY = shapes.SHAPES["tiny"]


@pytest.fixture(scope="module")
def model():
    built = shapes.build(TINY)
    compat.apply(built)
    return built


def test_shapes_are_those_of_the_real_models():
    assert [shape.features_per_image for shape in shapes.SHAPES.values()] == [6404, 6404, 6404, 68]
    kv = {name: 2 * 2 * s.features_per_image * s.key_value_heads * s.head_size * s.cross_layers / 2**20
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


def test_the_suite_has_a_row_for_everything_and_true_bytes(model):
    trims = {"half": {"keep": 0.5}, "lossless": {}}
    measured = layers.measure(model, TINY, trims=trims, batch=2, rows=9, tiles=1, rounds=2)
    rows = [row for row in measured if row["layer"] != "hooks"]
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
    hooks = [row for row in measured if row not in rows]
    assert [(row["phase"], row["way"], row["trim"]) for row in hooks] == [
        ("decode", "crosstrim", "half"),
        ("decode", "crosstrim", "lossless"),
    ]
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in hooks)


@pytest.mark.parametrize("trim", [{"keep": 0.5}, {}], ids=["keep", "lossless"])
def test_a_repeated_cache_is_that_of_a_repeated_prompt(model, trim):
    inputs = shapes.prompt(TINY, batch=2, rows=9)
    ways = layers.make_ways(model, inputs, {"one": trim})
    fourfold = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in inputs.items()}
    fourfold["cross_attention_states"] = inputs["cross_attention_states"].unflatten(0, (2, 4))
    fourfold["cross_attention_states"] = fourfold["cross_attention_states"].repeat_interleave(2, dim=0).flatten(0, 1)
    for way in ways.values():
        with torch.no_grad():
            cache = layers.prefilled(model, way, inputs, copies=2)
            with way():
                step = model(**layers.step(layers.repeated(inputs, 2), cache)()).logits
            expected = layers.prefilled(model, way, fourfold)
            with way():
                torch.testing.assert_close(step, model(**layers.step(fourfold, expected)()).logits)
        indices = (1, 2, 3)
        assert layers.held_bytes(cache, indices) == layers.held_bytes(expected, indices)


@pytest.fixture
def clock(monkeypatch):
    """Time as the overhead is measured with; it goes on only where a test says so."""
    time = [0.0]
    monkeypatch.setattr("crosstrim.bench.overhead.now", lambda device: time[0])

    def spend(seconds):
        time[0] += seconds

    return spend


def test_only_the_hooks_that_were_put_on_are_timed_and_none_stays(model, clock):
    before = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
    earlier = model.lm_head.register_forward_pre_hook(lambda *_: clock(5))

    @contextlib.contextmanager
    def put_on(model, seconds):
        hook = model.lm_head.register_forward_hook(lambda *_: clock(seconds))
        yield
        hook.remove()

    with torch.no_grad(), inside_hooks(model, put_on, seconds=3) as watch:
        model(**shapes.prompt(TINY, batch=1, rows=9))
    earlier.remove()
    assert watch.seconds == 3
    assert [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()] == before


def test_scoring_is_overhead_and_attention_is_none(model, clock, monkeypatch):
    for name, function, seconds in (
        ("crosstrim.models.interface.attend", attention.attend, 100),
        ("crosstrim.method.choose.saliency", crosstrim.saliency, 1),
    ):
        monkeypatch.setattr(name, lambda *args, f=function, s=seconds, **options: (clock(s), f(*args, **options))[1])
    with torch.no_grad(), inside_hooks(model, crosstrim.trim, keep=0.5) as watch:
        cache = DynamicCache(config=model.config.text_config)
        model(**shapes.prompt(TINY, batch=1, rows=9), past_key_values=cache)
    assert watch.seconds == 1


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
