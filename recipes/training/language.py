"""Stages two and three: the language model learns to answer, first on a fixed encoder, then both together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration

from . import attention, vision
from .stage import Stage
from .task import FIXED, JOINT, Drawn, Question, Task
from .tiles import IGNORE, image_inputs

_BLOCKED = -1e4


def pack(task: Task[Any], lessons: Sequence[Sequence[Question]]) -> dict[str, Tensor]:
    """Return one row per picture: the shared prefix and a segment per question, with the answers as targets.

    Raises:
        ValueError: A question needs more tokens than a segment has.
    """
    prefix = task.prefix
    rows = (len(lessons), len(lessons[0]), task.segment)
    inputs = np.full(rows, task.tokenizer.pad_token_id)
    targets = np.full(rows, IGNORE)
    for row, questions in enumerate(lessons):
        for column, question in enumerate(questions):
            tokens, start = task.tokens(question.text, question.answer)
            body, first = tokens[len(prefix) :], start - len(prefix)
            if len(body) > task.segment + 1:
                raise ValueError(f"{question} needs {len(body)} tokens, more than a segment has")
            inputs[row, column, : len(body) - 1] = body[:-1]
            targets[row, column, first - 1 : len(body) - 1] = body[first:]
    heads = np.broadcast_to(np.array(prefix), (rows[0], len(prefix)))
    blank = np.full(heads.shape, IGNORE)
    return {
        "input_ids": torch.from_numpy(np.concatenate([heads, inputs.reshape(rows[0], -1)], 1)),
        "targets": torch.from_numpy(np.concatenate([blank, targets.reshape(rows[0], -1)], 1)),
    }


def draw(task: Task[Drawn], stage: int, step: int) -> dict[str, Tensor]:
    """Draw the batch of one step: new pictures, several questions about each, and in the joint stage some crowds."""
    settings = task.settings
    rng = np.random.default_rng([settings.seed, stage, step])
    pictures = [task.draw("train", rng) for _ in range(settings.language_batch)]
    packed = pack(task, [task.lesson(picture, stage, step, rng) for picture in pictures])
    if stage == FIXED:
        return image_inputs(pictures) | packed
    crowds = [task.draw_crowd(rng, 1.0) for _ in range(settings.joint_crowds)]
    return vision.batch_of(task, pictures + crowds) | packed


def text_inputs(task: Task[Any], batch: dict[str, Tensor], features: int) -> dict[str, Any]:
    """Return the language model's inputs beside the features: positions, visible features, rows that see them."""
    rows, length = batch["input_ids"].shape
    prefix = len(task.prefix)
    within = torch.arange(length - prefix) % task.segment + prefix
    sees = torch.ones(rows, 1, length, 1)
    sees[:, :, : prefix - 1] = 0
    hidden = (1 - batch["aspect_ratio_mask"][:rows, 0].float()) * _BLOCKED
    return {
        "input_ids": batch["input_ids"],
        "position_ids": torch.cat([torch.arange(prefix), within])[None].expand(rows, -1),
        # The attention function knows who sees whom; a mask of four dimensions keeps transformers from making one.
        "attention_mask": torch.zeros(1, 1, 1, 1),
        "cross_attention_mask": hidden.repeat_interleave(features, 1)[:, None, None],
        "full_text_row_masked_out_mask": sees,
        "use_cache": False,
        "prefix": prefix,
        "segment": task.segment,
    }


def hidden_states(
    task: Task[Any], model: MllamaForConditionalGeneration, features: Tensor, batch: dict[str, Tensor]
) -> Tensor:
    """Return what the language model makes of every token [B, T, width], given vision features of the pictures."""
    states = model.model.multi_modal_projector(features).flatten(1, 2)
    text = text_inputs(task, batch, features.shape[2])
    return model.model.language_model(cross_attention_states=states, **text).last_hidden_state


def loss_of(
    task: Task[Any], model: MllamaForConditionalGeneration, features: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Return the mean loss over answer tokens, and how often the next one is right."""
    asked = batch["targets"] != IGNORE
    logits = model.lm_head(hidden_states(task, model, features, batch)[asked]).float()
    targets = batch["targets"][asked]
    loss = F.cross_entropy(logits, targets)
    return loss, {"loss": loss.item(), "right": (logits.argmax(-1) == targets).float().mean().item()}


def _prepare(model: MllamaForConditionalGeneration, task: Task[Any], train_vision: bool) -> None:
    model.config.vision_config._attn_implementation = attention.NAME
    model.config.text_config._attn_implementation = attention.NAME
    model.model.vision_model.requires_grad_(train_vision)
    # A projector that has learned to speak must not unlearn it before the language model listens.
    model.model.multi_modal_projector.requires_grad_(train_vision or not task.speaks)


def train(model: MllamaForConditionalGeneration, task: Task[Any], folder: Path) -> dict[str, float]:
    """Run stage two, the language model on a fixed encoder, and return how long it took."""
    _prepare(model, task, train_vision=False)
    settings = task.settings
    stage = Stage("language", folder, settings, settings.language_steps, {"model": model}, floor=settings.joint_scale)

    def loss(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            features = vision.encode(model, batch)
        return loss_of(task, model, features, batch)

    stage.run(lambda step: draw(task, FIXED, step), loss)
    return {"seconds": stage.seconds}


def train_jointly(
    model: MllamaForConditionalGeneration, heads: vision.Heads, task: Task[Any], folder: Path
) -> dict[str, float]:
    """Run stage three, everything at once: answers, and the patches' own lesson with some crowds added to it."""
    _prepare(model, task, train_vision=True)
    settings = task.settings
    modules: dict[str, nn.Module] = {"model": model, "heads": heads}
    stage = Stage("joint", folder, settings, settings.joint_steps, modules, settings.joint_scale)

    def loss(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        features = vision.encode(model, batch)
        seen, seen_figures = vision.loss_of(task, heads, features, batch)
        told, told_figures = loss_of(task, model, features[: len(batch["input_ids"])], batch)
        return told + seen, told_figures | seen_figures

    stage.run(lambda step: draw(task, JOINT, step), loss)
    return {"seconds": stage.seconds} | vision.accuracy(model, heads, task)
