"""The checkpoint that ships: loads offline, is a real Mllama, and is what its card says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, MllamaForConditionalGeneration, MllamaProcessor

from crosstrim import mini
from crosstrim.models import compat


@pytest.fixture(scope="module")
def model() -> MllamaForConditionalGeneration:
    loaded = MllamaForConditionalGeneration.from_pretrained(mini.path(), local_files_only=True, use_safetensors=True)
    compat.apply(loaded)
    return loaded.eval()


@pytest.fixture(scope="module")
def processor() -> MllamaProcessor:
    return AutoProcessor.from_pretrained(mini.path(), local_files_only=True)


def test_ships_safetensors_only_and_small() -> None:
    names = {path.name for path in mini.path().iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert (mini.path() / "model.safetensors").stat().st_size <= 20_000_000


def test_processor_is_the_real_one_without_torchvision(processor: MllamaProcessor) -> None:
    assert isinstance(processor, MllamaProcessor)
    assert processor.image_processor.max_image_tiles == 4


def test_architecture_is_what_trimming_needs(model: MllamaForConditionalGeneration) -> None:
    text, vision = model.config.text_config, model.config.vision_config
    assert model.config.image_token_index == text.vocab_size
    assert len(text.cross_attention_layers) >= 3
    assert min(text.cross_attention_layers) >= 2
    assert text.num_key_value_heads < text.num_attention_heads
    assert vision.max_num_tiles == 4
    assert ((vision.image_size // vision.patch_size) ** 2 + 1) % 8


def test_gates_are_open(model: MllamaForConditionalGeneration) -> None:
    gates = {name: value for name, value in model.named_parameters() if "gate" in name and value.numel() == 1}
    assert len(gates) >= 2 * len(model.config.text_config.cross_attention_layers)
    assert all(value.abs().item() > 0.05 for name, value in gates.items() if "cross_attn" in name)


def test_prompts_follow_llama_3_vision(processor: MllamaProcessor) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the 3?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>Where is the 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids.count(processor.tokenizer.bos_token_id) == 1


def test_heldout_has_every_kind_over_every_layout() -> None:
    rows = mini.heldout()
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["layout"] for row in rows}) == 8
    assert min(Counter(row["kind"] for row in rows).values()) >= 200
    assert len(set(Counter(row["layout"] for row in rows).values())) == 1
    assert all(Path(row["image"]).is_file() and row["answers"] for row in rows)


def test_answers_the_examples(model: MllamaForConditionalGeneration, processor: MllamaProcessor) -> None:
    right = []
    for example in mini.examples():
        for asked in example["questions"]:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked["question"]}]}]
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
            picture = Image.open(example["image"]).convert("RGB")
            inputs = processor(images=picture, text=prompt, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                output = model.generate(**inputs, max_new_tokens=12)
            answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right.append(answer.strip() in asked["answers"])
    assert sum(right) >= 0.8 * len(right)
