"""Weights in four or eight bits: which they are, what is kept with them, and that nothing takes them for others."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import crosstrim
from crosstrim import capacity, memory
from crosstrim.asking.features import FeatureCache
from crosstrim.bench import shapes
from crosstrim.calibrated import CalibratedConfig
from crosstrim.errors import CalibrationError
from crosstrim.eval import provenance
from crosstrim.models import compat, fingerprint, mllama, quantised
from tests.support import oracle, tiny, tiny_checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao")

FORMATS = list(memory.WEIGHT_BITS)
SAMPLES = [[2, tiny.Image(4), 9], [1, tiny.Image(1, seed=1), 4]]
BATCH = tiny.inputs(*SAMPLES)


def quantise(checkpoint, name, whole=None):
    config = quantised.request(name, tiny.config(), torch.float32, whole)
    return crosstrim.load(checkpoint, quantization_config=config)[0]


@pytest.fixture(scope="module", params=FORMATS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def made(checkpoint):
    """As `--quantize` makes it, one of each format."""
    return cache(lambda name: crosstrim.load(checkpoint, quantization=name)[0])


@pytest.fixture(scope="module")
def usual(made, name):
    return made(name)


@pytest.fixture(scope="module")
def everything(checkpoint, name):
    """With the layer that scores quantised as well."""
    return quantise(checkpoint, name, ["lm_head", "model.multi_modal_projector"])


def matrix(module: nn.Module) -> torch.Tensor | None:
    """The whole matrix that a quantised layer multiplies by; None: the layer is not quantised."""
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if type(weight).__module__.startswith("torchao") else None


def dequantised(model: nn.Module) -> nn.Module:
    """The plain model with the same matrices."""
    plain = tiny.build()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and (values := matrix(module)) is not None:
                plain.get_submodule(name).weight.copy_(values)
    compat.apply(plain)
    return plain


def answers(model):
    return model.generate(**BATCH, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=tiny.PAD)


def test_what_is_quantised(usual, name):
    plain = tiny.build()
    linear = {path for path, one in plain.named_modules() if isinstance(one, nn.Linear)}
    found = {path for path, one in usual.named_modules() if isinstance(one, nn.Linear) and matrix(one) is not None}
    leader = f"model.language_model.layers.{tiny.CROSS_LAYERS[0]}.cross_attn"
    left = {"lm_head", "model.multi_modal_projector", *(f"{leader}.{one}_proj" for one in "qkv")}
    left |= {path for path in linear if path.startswith("model.vision_model.")}
    assert left < linear
    assert found == linear - left
    own = dict(usual.named_parameters())
    for path, weight in plain.named_parameters():
        if path.removesuffix(".weight") not in found:
            assert torch.equal(own[path], weight), path
    assert quantised.name_of(usual.config) == name
    assert usual.dtype == torch.float32


@pytest.mark.parametrize("options", [{"k": 0.1}, {"keep": 0.3, "policy": "union"}], ids=str)
def test_what_is_kept_is_what_the_dequantised_matrices_score(everything, options):
    plain = dequantised(everything)
    knobs = {name: value for name, value in options.items() if name != "policy"}
    expected = oracle.kept_features(plain, BATCH, **knobs)
    with crosstrim.trim(everything, **options) as trimmed:
        tokens = answers(everything)
        report = trimmed.report()
    kept = [[index for image in row for index in image.kept_indices] for row in report.samples]
    assert kept == [row.nonzero().squeeze(-1).tolist() for row in expected]
    assert report.kept < report.visible
    with crosstrim.trim(plain, **options):
        assert torch.equal(answers(plain), tokens)


def test_lossless_is_the_quantised_model(usual):
    expected = answers(usual)
    with crosstrim.trim(usual) as trimmed:
        assert torch.equal(answers(usual), expected)
    report = trimmed.report()
    assert 0 < report.kept == report.visible < sum(image.features for row in report.samples for image in row)


def test_weights_are_told_apart(checkpoint, loaded, usual, everything, name):
    found = [fingerprint.of_weights(one) for one in (loaded[0], usual, everything)]
    assert len(set(found)) == 3
    assert fingerprint.of_weights(crosstrim.load(checkpoint, quantization=name)[0]) == found[1]
    assert fingerprint.of_weights_again(usual) == found[1]
    assert provenance.of_model(usual, "tiny")["quantization"] == name
    assert "quantization" not in provenance.of_model(loaded[0], "tiny")


def test_formats_are_told_apart(made):
    assert len({fingerprint.of_weights(made(name)) for name in FORMATS}) == len(FORMATS)


def test_the_model_stays_the_same_where_a_cpu_packs_weights_anew(checkpoint):
    """What bitsandbytes does in the first pass on CPUs with AVX512-BF16."""
    model = crosstrim.load(checkpoint, quantization="nf4")[0]
    before = fingerprint.of_weights(model)
    state = model.model.language_model.layers[0].mlp.up_proj.weight.quant_state
    state.absmax, absmax = state.absmax // 2, state.absmax
    assert fingerprint.of_weights(model) != before  # scales count
    state.absmax = absmax
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    weight.data, weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    assert fingerprint.of_weights(model) != before
    assert fingerprint.of_weights_again(model) == before


def test_features_of_a_tower_that_was_quantised_are_new(model):
    entered = []
    model.model.vision_model.register_forward_hook(lambda *_: entered.append(1))
    cache = FeatureCache()
    whole = cache.features(model, BATCH)
    assert torch.equal(cache.features(model, BATCH), whole)
    torchao.quantize_(model.model.vision_model, torchao.quantization.Int8WeightOnlyConfig(version=2))
    assert not torch.equal(cache.features(model, BATCH), whole)
    assert len(entered) == 2


def test_a_picture_is_encoded_once(usual):
    entered, cache = [], FeatureCache()
    hook = usual.model.vision_model.register_forward_hook(lambda *_: entered.append(1))
    for _ in range(3):
        cache.features(usual, BATCH)
    hook.remove()
    assert len(entered) == 1


def calibrated(model) -> CalibratedConfig:
    facts = provenance.of_model(model, "tiny")
    repairs = {finding.name: finding.repaired for finding in compat.check(model)}
    config = crosstrim.TrimConfig(keep=0.5)
    made_with = {"config": config.to_dict(), "model": facts, "compat": repairs}
    return CalibratedConfig(**config.options(), path="c.json", made_with=made_with)


def test_a_calibration_holds_for_the_precision_that_it_was_made_with(loaded, usual, everything, name):
    whole = loaded[0]
    for model in (whole, usual):
        crosstrim.trim(model, calibrated(model)).remove()
    with pytest.raises(CalibrationError, match=rf"quantization \({name} there, none here\); quantise it by {name}"):
        crosstrim.trim(whole, calibrated(usual))
    with pytest.raises(CalibrationError, match=rf"quantization \(none there, {name} here\); load the model without"):
        crosstrim.trim(usual, calibrated(whole))
    with pytest.raises(CalibrationError, match="weights"):
        crosstrim.trim(everything, calibrated(usual))


@pytest.fixture(scope="module")
def real_layers(tmp_path_factory):
    """Two cross-attention layers of 11B and one of self-attention, with fewer features a tile, as a checkpoint."""
    folder = tmp_path_factory.mktemp("real")
    shape = replace(shapes.SHAPES["11B"], features_per_tile=101)
    model = shapes.build(shape, cross_layers=2, feed_forward=512, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_checkpoint.processor().save_pretrained(folder)
    return shape, folder


@pytest.mark.slow
def test_layers_of_real_shape(real_layers):
    shape, folder = real_layers
    model, _ = crosstrim.load(folder, quantization="nf4")
    inputs = shapes.prompt(shape, batch=1, rows=12, tiles=1, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(**inputs).logits
        with crosstrim.trim(model):
            torch.testing.assert_close(model(**inputs).logits, expected, atol=0.05, rtol=0)
        with crosstrim.trim(model, keep=0.25) as trimmed:
            assert not torch.equal(model(**inputs).logits, expected)
    assert (trimmed.report().kept, trimmed.report().visible) == (26, 101)
    known = mllama.shape_of(model.config, "two layers")
    computed = capacity.weight_bytes(known, quantised.matrix_parameters(model.config), "nf4")
    assert held_bytes(model) == pytest.approx(computed, rel=2e-3)


def held_bytes(model: nn.Module) -> int:
    """Of all weights, scales and scales of scales included."""
    total = 0
    for weight in model.parameters():
        parts = [part for _, part in quantised.parts(weight)]
        state = getattr(weight, "quant_state", None)
        total += sum(part.nbytes for part in parts) + (state.state2.absmax.nbytes if state is not None else 0)
    return total
