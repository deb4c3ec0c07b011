"""Folders that hold no model that can be loaded: every refusal by its words."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration

from crosstrim import mini
from crosstrim.errors import LoadError, UnsupportedModelError
from crosstrim.models import compat
from tests.support.loading import refused

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def test_a_file_is_no_folder(checkpoint):
    assert "is a file; give the folder that holds" in refused(LoadError, checkpoint / WEIGHTS)


def test_an_empty_folder(tmp_path):
    assert "holds no config.json; give a folder written by save_pretrained" in refused(LoadError, tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            '{"base_model_name_or_path": "meta-llama/Llama-3.2-11B-Vision-Instruct", "peft_type": "LORA"}',
            "an adapter of meta-llama/Llama-3.2-11B-Vision-Instruct, and no model; load the base by model, "
            "processor = crosstrim.load('meta-llama/Llama-3.2-11B-Vision-Instruct'), put",
        ),
        ('{"peft_type": "LORA"}', "an adapter whose adapter_config.json names no base model, and no model; load the"),
        ("[]", "crosstrim.load(the model it was trained on)"),
        ("{", "names no base model"),
    ],
)
def test_an_adapter_says_what_to_load(tmp_path, config, words):
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    message = refused(LoadError, tmp_path)
    assert words in message
    assert f"model = peft.PeftModel.from_pretrained(model, {str(tmp_path)!r})" in message
    assert message.endswith("then trim that by crosstrim.trim(model).")


def test_the_mini_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(mini, "path", lambda: tmp_path)
    assert "the embedded model is missing from this installation" in refused(LoadError)


def test_a_pickle_is_never_opened(copy):
    (copy / WEIGHTS).unlink()
    (copy / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "holds no *.safetensors (only pytorch_model.bin, a pickle, which could run code" in refused(
        LoadError, copy
    )
    (copy / "pytorch_model.bin").unlink()
    assert "holds no *.safetensors (no weights)" in refused(LoadError, copy)


def damage_cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def damage_garbage(folder):
    (folder / WEIGHTS).write_bytes(b"garbage" * 99)


def damage_lacking(folder):
    weights = load_file(folder / WEIGHTS)
    weights.pop("multi_modal_projector.bias")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def damage_shape(folder):
    weights = load_file(folder / WEIGHTS)
    weights["multi_modal_projector.bias"] = torch.zeros(3)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def damage_shard(folder):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    index["weight_map"]["multi_modal_projector.bias"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def damage_processor(folder):
    (folder / "processor_config.json").unlink()


def damage_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def damage_auto_map(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of the repository was run')")


DAMAGES = [
    (damage_cut, "the weights of {} could not be loaded (SafetensorError: "),
    (damage_garbage, "the weights of {} could not be loaded (SafetensorError: "),
    (damage_lacking, "{} lacks 1 of the model's weights, such as model.multi_modal_projector.bias; download"),
    (
        damage_shape,
        "{} has a weight model.multi_modal_projector.bias of shape (3,) where its config.json asks for (64,)",
    ),
    (damage_shard, "the weights of {} could not be loaded ("),
    (damage_tokenizer, "the processor of {} could not be loaded ("),
    (damage_processor, "the processor of {} could not be loaded ("),
    (damage_json, "{}/config.json is not valid JSON ("),
    (damage_auto_map, "{} asks to run code of its own (auto_map in config.json), which crosstrim never does."),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=lambda case: getattr(case, "__name__", ""))
def test_damage_is_told_and_leaves_nothing_behind(copy, monkeypatch, damage, words):
    monkeypatch.setattr(compat, "apply", lambda *_: pytest.fail("a hook was put on before everything was loaded"))
    damage(copy)
    before = sorted(copy.iterdir())
    message = refused(LoadError, copy)
    assert message.startswith(words.format(copy))
    assert "\n" not in message
    assert sorted(copy.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"attn_implementation": "foo"}, 'attn_implementation="foo"'),
        ({"quantization_config": {"quant_method": "foo"}}, "foo"),
    ],
)
def test_what_transformers_refuses_is_not_blamed_on_the_weights(checkpoint, options, words):
    message = refused(LoadError, checkpoint, **options)
    ((name, value),) = options.items()
    assert message.startswith(f"{checkpoint} could not be loaded (")
    assert words in message.replace("Flash Attention 2", "FlashAttention2")  # versions of transformers differ
    assert message.endswith(f"try it without {name}={value!r}.")
    assert "download" not in message


def test_what_transformers_cannot_do_without_any_option(checkpoint, monkeypatch):
    def fail(*_args, **_options):
        raise AttributeError("no such thing")

    monkeypatch.setattr(MllamaForConditionalGeneration, "from_pretrained", fail)
    assert refused(LoadError, checkpoint) == (
        f"{checkpoint} could not be loaded (AttributeError: no such thing); try another version of transformers."
    )


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "mllama_text_model", "architectures": ["MllamaForCausalLM"]},
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
        {"architectures": ["Something"]},
        {},
        [],
    ],
)
def test_another_architecture_is_refused_before_its_weights_are_read(copy, monkeypatch, config):
    (copy / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(MllamaForConditionalGeneration, "from_pretrained", lambda *_: pytest.fail("read"))
    words = refused(UnsupportedModelError, copy)
    assert "with model_type" in words
    assert "crosstrim loads Llama-3.2-Vision (model_type 'mllama')" in words
