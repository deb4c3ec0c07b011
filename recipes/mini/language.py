"""Stages two and three: the language model learns to answer, first on a fixed encoder, then both together."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration, PreTrainedTokenizerFast

from . import attention
from .pictures import IGNORE, scene
from .questions import MOSTLY_READING, MOSTLY_WHOLE, WHOLE, Question, lesson
from .settings import LAYOUTS, Settings
from .tokenizer import CHAT_TEMPLATE, build_tokenizer
from .training import Stage
from .vision import Heads, accuracy, draw_crowd, encode, image_inputs, labels_of
from .vision import loss_of as patches_loss_of

_BLOCKED = -1e4
SEGMENT = 21
"""Tokens of the longest question with its answer, without the shared prefix and the last end of turn."""


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@cache
def _tokens(question: str, answer: str) -> tuple[tuple[int, ...], int]:
    """Return a question's and its answer's tokens as the chat template writes them, and where the answer starts."""
    tokenizer = _tokenizer()
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = tokenizer.apply_chat_template(
        ask, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    ends = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return (*prompt, *ends), len(prompt)


@cache
def shared_prefix() -> tuple[int, ...]:
    """Return the tokens that every prompt starts with, up to and including the image token."""
    tokens, _ = _tokens("", "")
    return tokens[: tokens.index(_tokenizer().convert_tokens_to_ids("<|image|>")) + 1]


def pack(lessons: list[list[Question]]) -> dict[str, Tensor]:
    """Return one row per picture: the shared prefix and a segment per question, with the answers as targets."""
    prefix = shared_prefix()
    rows = (len(lessons), len(lessons[0]), SEGMENT)
    inputs = np.full(rows, _tokenizer().pad_token_id)
    targets = np.full(rows, IGNORE)
    for row, questions in enumerate(lessons):
        for column, question in enumerate(questions):
            tokens, start = _tokens(question.text, question.answer)
            body, first = tokens[len(prefix) :], start - len(prefix)
            if len(body) > SEGMENT + 1:
                raise ValueError(f"{question} needs {len(body)} tokens, more than a segment has")
            inputs[row, column, : len(body) - 1] = body[:-1]
            targets[row, column, first - 1 : len(body) - 1] = body[first:]
    heads = np.broadcast_to(np.array(prefix), (rows[0], len(prefix)))
    blank = np.full(heads.shape, IGNORE)
    return {
        "input_ids": torch.from_numpy(np.concatenate([heads, inputs.reshape(rows[0], -1)], 1)),
        "targets": torch.from_numpy(np.concatenate([blank, targets.reshape(rows[0], -1)], 1)),
    }


def draw(settings: Settings, stage: int, step: int, crowds: int = 0) -> dict[str, Tensor]:
    """Draw the batch of one step: new pictures over all layouts, several questions about each, and some crowds.

    With crowds it is the joint stage, which asks more about the whole picture.
    """
    rng = np.random.default_rng([settings.seed, stage, step])
    scenes = [scene("train", LAYOUTS[rng.integers(len(LAYOUTS))], rng) for _ in range(settings.language_batch)]
    late = MOSTLY_READING if step >= settings.reading_from else MOSTLY_WHOLE
    whole = late if crowds else WHOLE
    packed = pack([lesson(item, settings.segments, rng, whole) for item in scenes])
    scenes += [draw_crowd(rng) for _ in range(crowds)]
    return image_inputs(scenes) | labels_of(scenes) | packed


def _text_inputs(batch: dict[str, Tensor], patches: int) -> dict[str, Any]:
    """Return the language model's inputs beside the features: positions, visible features, rows that see them."""
    rows, length = batch["input_ids"].shape
    prefix = len(shared_prefix())
    within = torch.arange(length - prefix) % SEGMENT + prefix
    sees = torch.ones(rows, 1, length, 1)
    sees[:, :, : prefix - 1] = 0
    hidden = (1 - batch["aspect_ratio_mask"][:, 0].float()) * _BLOCKED
    return {
        "input_ids": batch["input_ids"],
        "position_ids": torch.cat([torch.arange(prefix), within])[None].expand(rows, -1),
        # The attention function knows who sees whom; a mask of four dimensions keeps transformers from making one.
        "attention_mask": torch.zeros(1, 1, 1, 1),
        "cross_attention_mask": hidden.repeat_interleave(patches, 1)[:, None, None],
        "full_text_row_masked_out_mask": sees,
        "use_cache": False,
        "prefix": prefix,
        "segment": SEGMENT,
    }


def loss_of(
    model: MllamaForConditionalGeneration, features: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Return the mean loss over answer tokens, and how often the next one is right."""
    states = model.model.multi_modal_projector(features).flatten(1, 2)
    text = _text_inputs(batch, features.shape[2])
    hidden = model.model.language_model(cross_attention_states=states, **text).last_hidden_state
    asked = batch["targets"] != IGNORE
    logits = model.lm_head(hidden[asked]).float()
    targets = batch["targets"][asked]
    loss = F.cross_entropy(logits, targets)
    return loss, {"loss": loss.item(), "right": (logits.argmax(-1) == targets).float().mean().item()}


def _prepare(model: MllamaForConditionalGeneration, train_vision: bool) -> None:
    model.config.vision_config._attn_implementation = attention.NAME
    model.config.text_config._attn_implementation = attention.NAME
    model.model.vision_model.requires_grad_(train_vision)


def train(model: MllamaForConditionalGeneration, settings: Settings, folder: Path) -> dict[str, float]:
    """Run stage two, the language model on a fixed encoder, and return how long it took."""
    _prepare(model, train_vision=False)
    steps, floor = settings.language_steps, settings.joint_scale
    stage = Stage("language", folder, settings, steps, {"model": model}, floor=floor)

    def loss(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            features = encode(model, batch)
        return loss_of(model, features, batch)

    stage.run(lambda step: draw(settings, 2, step), loss)
    return {"seconds": stage.seconds}


def train_jointly(
    model: MllamaForConditionalGeneration, heads: Heads, settings: Settings, folder: Path
) -> dict[str, float]:
    """Run stage three, everything at once: answers, and the patches' own lesson with some crowds added to it."""
    _prepare(model, train_vision=True)
    modules = {"model": model, "heads": heads}
    stage = Stage("joint", folder, settings, settings.joint_steps, modules, settings.joint_scale)

    def loss(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        features = encode(model, batch)
        seen, seen_figures = patches_loss_of(heads, features, batch)
        rows = len(batch["input_ids"])
        asked = {**batch, "aspect_ratio_mask": batch["aspect_ratio_mask"][:rows]}
        told, told_figures = loss_of(model, features[:rows], asked)
        return told + seen, told_figures | seen_figures

    stage.run(lambda step: draw(settings, 3, step, settings.joint_crowds), loss)
    return {"seconds": stage.seconds} | accuracy(model, heads, "validation", settings)
