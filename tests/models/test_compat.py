"""The departures of transformers from Meta's reference: seen, repaired, undone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import crosstrim
from crosstrim.errors import CompatWarning, ConfigError, UnsupportedModelError
from crosstrim.models import compat
from tests.support import tiny
from tests.support.passes import hooks_on
from tests.support.tiny import Image


def vision_features(model, batch):
    with torch.no_grad():
        return model.model.vision_model(
            batch["pixel_values"], batch["aspect_ratio_ids"], batch["aspect_ratio_mask"]
        ).last_hidden_state


def reference_features(model, batch):
    """Meta's vision tower, written out: intermediate index i is the state BEFORE local layer i."""
    tower = model.model.vision_model
    pixels = batch["pixel_values"]
    images, tiles = pixels.shape[0] * pixels.shape[1], pixels.shape[2]
    ratio = batch["aspect_ratio_ids"].reshape(images, -1)
    x = F.conv2d(pixels.flatten(0, 2), tower.patch_embedding.weight, stride=tower.patch_size)
    x = x.flatten(2).transpose(1, 2)
    width = x.shape[-1]
    before = tower.pre_tile_positional_embedding
    x = (
        x.reshape(images, tiles, -1, width)
        + before.embedding(ratio).reshape(-1, tiles, 1, width) * before.gate.tanh()
    )
    x = torch.cat([tower.class_embedding.expand(images, tiles, 1, width), x], dim=2)
    positions = tower.gated_positional_embedding
    x = x + (1 - positions.gate.tanh()) * positions.embedding
    x = x + positions.gate.tanh() * positions.tile_embedding(ratio).reshape(images, tiles, -1, width)
    x = tower.layernorm_pre(x)
    features = x.shape[2]
    padding = -features % 8
    x = F.pad(x, (0, 0, 0, padding))
    # Padding (tiles and lanes) is kept from attending to padding alone.
    real = batch["aspect_ratio_mask"].reshape(images, tiles, 1).expand(-1, -1, features + padding).clone()
    real[:, :, features:] = 0
    pad = 1.0 - real.reshape(images, -1, 1).float()
    mask = (pad @ pad.transpose(1, 2) * torch.finfo(torch.float32).min).unsqueeze(1)
    x = x.reshape(images, -1, width)
    states = []
    for layer in tower.transformer.layers:
        states.append(x)
        x = block(layer, x, mask, 1.0, 1.0)
    x = tower.layernorm_post(x)
    after = tower.post_tile_positional_embedding
    x = x.reshape(images, tiles, -1, width) + after.embedding(ratio).reshape(-1, tiles, 1, width) * after.gate.tanh()
    x = x.reshape(images, -1, width)
    for layer in tower.global_transformer.layers:
        x = block(layer, x, mask, layer.gate_attn.tanh(), layer.gate_ffn.tanh())
    chosen = torch.stack([states[i] for i in tower.intermediate_layers_indices], dim=-1).flatten(2)
    out = torch.cat([x, chosen], dim=-1).reshape(images, tiles, features + padding, -1)[:, :, :features]
    return out.reshape(pixels.shape[0], pixels.shape[1], tiles, features, -1)


def block(layer, x, mask, attention_gate, feed_forward_gate):
    attention = layer.self_attn
    y = layer.input_layernorm(x)
    q, k, v = (
        proj(y).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = (q @ k.transpose(-1, -2) * attention.head_dim**-0.5 + mask).softmax(-1)
    x = x + attention_gate * attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    y = layer.post_attention_layernorm(x)
    return x + feed_forward_gate * layer.mlp.fc2(F.gelu(layer.mlp.fc1(y)))


@pytest.fixture
def batch():
    return tiny.inputs([3, Image(4), 6], [1, Image(1, seed=1), 2, Image(3, seed=2), 3])


def test_repaired_vision_features_equal_the_reference_and_go_back_on_undo(raw_model, batch):
    stock = vision_features(raw_model, batch)
    with torch.no_grad():
        reference = reference_features(raw_model, batch)
    assert (stock - reference).abs().max() > 0.1  # the departure is real
    with compat.apply(raw_model):
        torch.testing.assert_close(vision_features(raw_model, batch), reference, atol=1e-5, rtol=0)
    assert torch.equal(vision_features(raw_model, batch), stock)


def test_rows_before_the_image_leave_the_layers_unchanged_once_repaired(raw_model, batch):
    layer = raw_model.model.language_model.layers[tiny.CROSS_LAYERS[0]]
    seen = {}
    layer.register_forward_hook(lambda m, args, kw, out: seen.update(entered=args[0], left=out), with_kwargs=True)
    blind = ~batch["cross_attention_mask"].flatten(2).any(-1)

    def moved():
        with torch.no_grad():
            raw_model(**batch)
        return (seen["left"] - seen["entered"]).abs().amax(-1)

    before = moved()
    assert before[blind].min() > 0
    with compat.apply(raw_model):
        # The observing hook was put on first, so look at what the next layer gets instead.
        following = raw_model.model.language_model.layers[tiny.CROSS_LAYERS[0] + 1]
        hook = following.register_forward_pre_hook(lambda m, args: seen.update(left=args[0]))
        during = moved_by_next(raw_model, batch, seen)
        hook.remove()
        assert during[blind].max() == 0
        assert during[~blind].min() > 0
    assert torch.equal(moved(), before)


def moved_by_next(model, batch, seen):
    collected = {}
    layer = model.model.language_model.layers[tiny.CROSS_LAYERS[0]]
    hook = layer.register_forward_pre_hook(lambda m, args: collected.update(entered=args[0]))
    following = model.model.language_model.layers[tiny.CROSS_LAYERS[0] + 1]
    other = following.register_forward_pre_hook(lambda m, args: collected.update(left=args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    other.remove()
    return (collected["left"] - collected["entered"]).abs().amax(-1)


def test_attention_without_a_mask_reads_every_feature_once_repaired(raw_model):
    attention = raw_model.model.language_model.layers[tiny.CROSS_LAYERS[0]].cross_attn
    rows, features = torch.randn(1, 5, 64), torch.randn(1, 11, 64)

    def difference():
        with torch.no_grad():
            without = attention(rows, cross_attention_states=features, attention_mask=None)[0]
            allowed = attention(rows, cross_attention_states=features, attention_mask=torch.zeros(1, 1, 5, 11))[0]
        return (without - allowed).abs().max()

    assert difference() > 1e-2
    with compat.apply(raw_model):
        assert difference() < 1e-5
    assert difference() > 1e-2


def test_findings_say_what_is_open(raw_model):
    names = ["vision_features", "blind_rows", "causal_without_mask"]
    assert [finding.name for finding in compat.check()] == names
    assert all(finding.departs and finding.open for finding in compat.check(raw_model))
    with compat.apply(raw_model, only="blind_rows"):
        assert [finding.name for finding in compat.check(raw_model) if finding.repaired] == ["blind_rows"]
    with compat.apply(raw_model):
        assert not any(finding.open for finding in compat.check(raw_model))
        assert {"name", "departs", "repaired", "summary", "reference"} == set(compat.check(raw_model)[0].to_dict())


def test_applying_twice_is_harmless_and_each_handle_undoes_its_own(raw_model):
    first = compat.apply(raw_model)
    second = compat.apply(raw_model)
    second.remove()
    assert not any(finding.open for finding in compat.check(raw_model))
    first.remove()
    first.remove()
    assert all(finding.open for finding in compat.check(raw_model))
    assert hooks_on(raw_model) == 0


def forget_probes():
    for probe in (compat._vision_states_are_late, compat._blind_rows_leak, compat._maskless_attention_is_causal):
        probe.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_probes_find_the_same_whatever_torchs_defaults(dtype):
    expected = compat.check()
    forget_probes()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            assert compat.check() == expected
    finally:
        torch.set_default_dtype(torch.float32)
        forget_probes()


def test_probing_leaves_the_random_state_alone():
    forget_probes()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    compat.check()
    assert torch.equal(torch.rand(1), expected)


def test_trim_warns_about_an_unrepaired_model_with_the_remedy(raw_model, model, recwarn):
    with pytest.warns(CompatWarning, match=r"crosstrim.compat.apply\(model\)"), crosstrim.trim(raw_model):
        pass
    recwarn.clear()
    with crosstrim.trim(model):
        pass
    assert not [warning for warning in recwarn if issubclass(warning.category, CompatWarning)]


def test_errors(raw_model):
    with pytest.raises(UnsupportedModelError, match="Linear holds no Mllama"):
        compat.apply(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="'vision'; there are vision_features, blind_rows"):
        compat.apply(raw_model, only="vision")
    assert hooks_on(raw_model) == 0


def compiled_apart(model, name):
    """Every decoder layer compiled by itself, as one does where a whole model is too much."""
    layers = model.model.language_model.layers
    for place, layer in enumerate(layers):
        if name == "compile in place":
            layer.compile(backend="eager")
        else:
            layers[place] = torch.compile(layer, backend="eager")


@pytest.mark.filterwarnings("error::crosstrim.errors.CompatWarning")
@pytest.mark.parametrize("name", ["compile in place", "wrap"])
@pytest.mark.parametrize("repaired", ["before", "after"])
def test_layers_compiled_one_by_one_are_still_repaired(raw_model, name, repaired):
    if repaired == "before":
        compat.apply(raw_model)
    compiled_apart(raw_model, name)
    if repaired == "after":
        assert [finding.name for finding in compat.check(raw_model) if finding.open] != []
        compat.apply(raw_model)
    assert not any(finding.open for finding in compat.check(raw_model))
    before = [len(module._forward_hooks) for module in raw_model.modules()]
    compat.apply(raw_model)
    assert [len(module._forward_hooks) for module in raw_model.modules()] == before
    crosstrim.trim(raw_model, k=0.5).remove()


def test_a_repair_inside_a_compiled_layer_works(shallow_model):
    model = shallow_model
    batch = tiny.inputs([3, Image(2), 4])
    with torch.no_grad():
        expected = model(**batch).logits
        compiled_apart(model, "wrap")
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
