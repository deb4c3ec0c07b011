"""The true 11B and 90B configurations on the meta device: shapes and bytes without a single weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

import crosstrim
from crosstrim import capacity, memory
from crosstrim.errors import UnsupportedModelError
from crosstrim.models import compat, mllama, quantised
from crosstrim.models.memory import bytes_per_sample
from tests.support import tiny

MIB = 2**20
SIZES = {
    # hidden, MLP, layers, query heads, cross-attention layers, cross-attention KV of one image in MiB
    "11B": (4096, 14336, 40, 32, 8, 200),
    "90B": (8192, 28672, 100, 64, 20, 500),
}


def configuration(name):
    hidden, feed_forward, layers, heads, cross, _ = SIZES[name]
    text = MllamaTextConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        cross_attention_layers=list(range(3, layers, 5)),
        pad_token_id=128004,
    )
    assert len(text.cross_attention_layers) == cross
    vision = MllamaVisionConfig(
        image_size=560,
        vision_output_dim=7680,
        intermediate_layers_indices=[3, 7, 15, 23, 30],
    )
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=128256, dtype=torch.bfloat16)


def on_meta(name):
    with torch.device("meta"):
        return MllamaForConditionalGeneration._from_config(configuration(name), dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("name", SIZES)
def test_prefill_and_a_decode_step_at_half_the_features(name, monkeypatch):
    model = on_meta(name)
    compat.apply(model)
    batch, rows, features = 1, 16, 4 * 1601
    with torch.device("meta"):
        prompt = {
            "input_ids": torch.zeros(batch, rows, dtype=torch.long),
            "pixel_values": torch.zeros(batch, 1, 4, 3, 560, 560, dtype=torch.bfloat16),
            "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(batch, 1, 4, dtype=torch.long),
            "cross_attention_mask": torch.ones(batch, rows, 1, 4, dtype=torch.long),
        }
        token = torch.zeros(batch, 1, dtype=torch.long)
    mask = torch.cat([prompt["cross_attention_mask"], prompt["cross_attention_mask"][:, -1:]], dim=1)
    followers_read, scores = [], {}
    layers = model.model.language_model.layers
    indices = model.config.text_config.cross_attention_layers
    for index in indices[1:]:
        layers[index].cross_attn.k_proj.register_forward_pre_hook(
            lambda m, args: followers_read.append(args[0].shape)
        )
    attention = AttentionInterface()["sdpa"]

    def record(module, queries, keys, values, mask, **kwargs):
        if getattr(module, "layer_idx", None) in indices:
            scores.setdefault(module.layer_idx, []).append(mask.shape)
        return attention(module, queries, keys, values, mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", record)
    with torch.no_grad():
        untrimmed = kv_bytes(model(**prompt).past_key_values, indices)
        followers_read.clear()
        scores.clear()
        with crosstrim.trim(model, keep=0.5, policy="union"):
            cache = model(**prompt).past_key_values
            held = kv_bytes(cache, indices)
            out = model(input_ids=token, cross_attention_mask=mask, past_key_values=cache)
    assert untrimmed == pytest.approx(SIZES[name][5] * MIB, rel=0.002)
    assert held * 2 == untrimmed
    assert out.logits.shape == (batch, 1, 128256)
    assert set(followers_read) == {torch.Size([batch, features // 2, SIZES[name][0]])}
    prefill, decode = zip(*scores.values(), strict=True)
    assert prefill == ((batch, 1, rows, features), *[(batch, 1, rows, features // 2)] * (len(indices) - 1))
    assert set(decode) == {torch.Size([batch, 1, 1, features // 2])}


def kv_bytes(cache, indices):
    return sum(cache.layers[index].keys.nbytes + cache.layers[index].values.nbytes for index in indices)


@pytest.mark.parametrize("name", SIZES)
def test_the_shapes_known_by_name_are_those_of_the_configurations(name):
    known = memory.SHAPES[name.lower()]
    assert mllama.shape_of(configuration(name), known.name) == known
    assert memory.image_kv_bytes(known) == pytest.approx(SIZES[name][5] * MIB, rel=0.002)
    assert memory.image_kv_bytes(known, 1601) * 4 == memory.image_kv_bytes(known)
    assert round(memory.image_kv_bytes(known) / memory.text_kv_bytes(known)) == 1601


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_arithmetic_is_what_a_cache_holds(dtype):
    model = tiny.build(dtype=dtype)
    shape = mllama.shape_of(tiny.config(dtype), "tiny")
    batch = tiny.inputs([3, tiny.Image(2), 5])
    with torch.no_grad():
        cache = model(**batch).past_key_values
    text = [index for index in range(len(cache.layers)) if index not in tiny.CROSS_LAYERS]
    assert memory.image_kv_bytes(shape) == kv_bytes(cache, tiny.CROSS_LAYERS)
    assert memory.text_kv_bytes(shape, batch["input_ids"].shape[1]) == kv_bytes(cache, text)
    assert shape.weight_bytes == sum(one.nbytes for one in model.parameters())


def test_another_configuration_is_refused():
    with pytest.raises(UnsupportedModelError, match="'mllama_text_model'; needed is 'mllama'"):
        mllama.shape_of(configuration("11B").text_config, "text")


@pytest.mark.parametrize(("name", "gib"), [("11B", "0.55"), ("90B", "0.99")])
def test_what_a_question_of_a_batch_takes(name, gib):
    """As docs/serving.md says it."""
    assert f"{bytes_per_sample(on_meta(name), 512 + 64) / 2**30:.2f}" == gib
    page = " ".join((Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8").split())
    assert f"{gib} GiB a row on the {name} model" in page


@pytest.mark.parametrize("name", SIZES)
def test_parameters_that_quantising_makes_smaller(name):
    assert quantised.matrix_parameters(configuration(name)) == capacity.MATRIX_PARAMETERS[name.lower()]


@pytest.mark.parametrize("name", SIZES)
def test_parameters_that_tensor_parallelism_copies(name):
    model = on_meta(name).model
    copied = [*model.vision_model.parameters(), *model.multi_modal_projector.parameters()]
    assert sum(one.numel() for one in copied) == capacity.VISION_PARAMETERS[name.lower()]
