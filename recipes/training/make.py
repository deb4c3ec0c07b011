"""All stages one after another, and the checkpoint as it ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MllamaForConditionalGeneration

from . import language, vision
from .model import build_model
from .task import Task
from .tokenizer import build_processor


def train(task: Task[Any], work: Path, checkpoint: Path) -> dict[str, Any]:
    """Train through all stages, from wherever they stand, write the checkpoint and return the log.

    Args:
        task: What to learn.
        work: Where the stages keep what they resume from.
        checkpoint: Where the finished model and its processor go.
    """
    work.mkdir(parents=True, exist_ok=True)
    model = build_model(task)
    torch.manual_seed(task.settings.seed)
    heads = vision.Heads(task, model)
    stages = {"vision": vision.train(model, heads, task, work)}
    stages["language"] = language.train(model, task, work)
    stages["joint"] = language.train_jointly(model, heads, task, work)
    export(model, task, checkpoint)
    return {
        "settings": task.settings.to_dict(),
        "parameters": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "stages": stages,
    }


def export(model: MllamaForConditionalGeneration, task: Task[Any], folder: Path) -> None:
    """Save the checkpoint as it ships: bfloat16 weights in safetensors, configuration and processor."""
    model.to(torch.bfloat16).save_pretrained(folder)
    build_processor(task.tokenizer, task.settings).save_pretrained(folder)
    model.float()
