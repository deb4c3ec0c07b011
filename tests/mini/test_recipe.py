"""The recipe runs from end to end, and its training attention is the model's own, only packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from PIL import Image
from recipes.mini import digits, pictures, questions
from recipes.mini.__main__ import make
from recipes.mini.evaluate import load, read_rows
from recipes.mini.settings import SMOKE
from recipes.mini.task import task
from recipes.training import attention, language, stage, tiles, vision
from recipes.training.model import build_model
from recipes.training.settings import LAYOUTS
from recipes.training.tokenizer import build_processor
from safetensors.torch import load_file


@pytest.mark.parametrize(("precision", "atol"), [("float32", 1e-4), ("bfloat16", 0.3)])
def test_packed_training_gives_the_logits_of_single_prompts(precision: str, atol: float) -> None:
    learned, rng = task(replace(SMOKE, precision=precision)), np.random.default_rng(0)
    model, processor = build_model(learned), build_processor(learned.tokenizer, learned.settings)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    scenes = [pictures.scene("test", layout, rng) for layout in LAYOUTS[:2]]
    lessons = [questions.lesson(scene, 4, rng) for scene in scenes]
    batch = tiles.image_inputs(scenes) | language.pack(learned, lessons)
    configs = (model.config.vision_config, model.config.text_config)
    for config in configs:
        config._attn_implementation = attention.NAME
    with torch.no_grad(), stage.autocast(learned.settings):
        hidden = language.hidden_states(learned, model, vision.encode(model, batch), batch)
        packed = model.lm_head(hidden).float()
    for config in configs:
        config._attn_implementation = "sdpa"
    prefix = len(learned.prefix)
    for row, (scene, lesson) in enumerate(zip(scenes, lessons, strict=True)):
        for column, asked in enumerate(lesson):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.text}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True) + asked.answer
            picture = [[Image.fromarray(scene.pixels)]]
            inputs = processor(images=picture, text=[text], add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                single = model(**inputs, use_cache=False).logits[0, prefix:]
            start = prefix + column * learned.segment
            # Logits have a spread of several units.
            torch.testing.assert_close(packed[row, start : start + len(single)], single, atol=atol, rtol=atol / 3)


@pytest.mark.slow
def test_a_tiny_run_makes_a_checkpoint_and_repeats_itself(tmp_path: Path) -> None:
    digits.stamps_by_value("train")  # which every process that draws pictures has from this one

    def run(work: str, package: str) -> dict[str, Any]:
        return make(SMOKE, tmp_path / work, tmp_path / package, pictures=len(LAYOUTS))

    log = run("work", "package")
    assert set(log["stages"]) == {"vision", "language", "joint"}
    model, processor = load(tmp_path / "package" / "checkpoint")
    assert processor.tokenizer.convert_tokens_to_ids("<|image|>") == model.config.text_config.vocab_size
    rows = read_rows(tmp_path / "package" / "heldout" / "questions.jsonl")
    assert {row["kind"] for row in rows} == set(questions.KINDS)

    with pytest.raises(ValueError, match=r"vision\.safetensors is of a run with other settings"):
        make(replace(SMOKE, seed=1), tmp_path / "work", tmp_path / "other", pictures=len(LAYOUTS))

    # A finished run resumes to the same weights, and so does a new one.
    run("work", "resumed")
    run("again", "repeated")
    first, resumed, repeated = (
        load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("package", "resumed", "repeated")
    )
    for name, value in first.items():
        assert torch.equal(value, resumed[name])
        torch.testing.assert_close(value, repeated[name], atol=1e-2, rtol=1e-2)
    # What the optimizers hold also tells whether the pictures were the same: weights hardly move in two steps.
    trained, repeated = (load_file(tmp_path / name / "joint.safetensors") for name in ("work", "again"))
    for name, value in trained.items():
        torch.testing.assert_close(value, repeated[name], atol=1e-6, rtol=1e-3, msg=name)
