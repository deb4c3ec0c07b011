"""Stage one: the vision encoder learns to say, for every patch, what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration

from . import attention
from .spoken import Speech
from .stage import Stage, autocast
from .task import Drawn, Head, Task
from .tiles import IGNORE, image_inputs

_STAGE = 1
_SPEAKING = 5.0
_CROWDS_ALONE = 0.4
_VALIDATION, _JUDGED_AT_ONCE = 11, 16


class Heads(nn.Module):
    """What the encoder is asked while it trains; thrown away afterwards."""

    def __init__(self, task: Task[Any], model: MllamaForConditionalGeneration) -> None:
        super().__init__()
        self.speech = Speech(task, model) if task.speaks else None
        features = task.settings.vision_width * (1 + len(task.settings.vision_intermediate))

        def linear(heads: Mapping[str, Head]) -> nn.ModuleDict:
            return nn.ModuleDict({name: nn.Linear(features, head.classes) for name, head in heads.items()})

        self.patches, self.whole = linear(task.patches), linear(task.whole)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return the logits [B, MAX_TILES, patches, classes] of every patch, and [B, classes] of every picture."""
        said = {name: head(features[:, :, 1:]) for name, head in self.patches.items()}
        return said | {name: head(features[:, 0, 0]) for name, head in self.whole.items()}


def encode(model: MllamaForConditionalGeneration, images: dict[str, Tensor]) -> Tensor:
    """Return the vision features [B, MAX_TILES, 1 + patches, features], before the projector."""
    mask = images["aspect_ratio_mask"]
    pixels = images["tiles"].permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    # The processor pads with zeros after scaling.
    pixels = pixels * mask[:, 0, :, None, None, None]
    vision = model.model.vision_model
    return vision(pixels[:, None], images["aspect_ratio_ids"], mask).last_hidden_state[:, 0]


def batch_of(task: Task[Drawn], pictures: list[Drawn]) -> dict[str, Tensor]:
    """Return image inputs of the pictures, and what the heads should say of each."""
    labels = [task.labels(picture) for picture in pictures]
    names = [*task.patches, *task.whole]
    return image_inputs(pictures) | {
        name: torch.from_numpy(np.stack([np.asarray(one[name]) for one in labels])) for name in names
    }


def loss_of(
    task: Task[Any], heads: Heads, features: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted sum of all heads' losses and of the speech's, and each one's to watch."""
    losses = {}
    for name, logits in heads(features).items():
        labels = batch[name].flatten()
        summed = F.cross_entropy(logits.float().flatten(0, -2), labels, ignore_index=IGNORE, reduction="sum")
        losses[name] = summed / (labels != IGNORE).sum().clamp(min=1)
    weights = {name: head.weight for name, head in (*task.patches.items(), *task.whole.items())}
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    if heads.speech is not None:
        losses["missed"] = heads.speech.loss(features, batch)
        total = total + _SPEAKING * losses["missed"]
    return total, {name: loss.item() for name, loss in losses.items()}


def draw(task: Task[Any], step: int) -> dict[str, Tensor]:
    """Draw the batch of one step: crowds alone at first, and later ordinary pictures among them."""
    settings = task.settings
    rng = np.random.default_rng([settings.seed, _STAGE, step])
    progress = step / settings.vision_steps
    crowded = 1.0 if progress < _CROWDS_ALONE else settings.crowded
    pictures = [
        task.draw_crowd(rng, progress) if rng.random() < crowded else task.draw("train", rng)
        for _ in range(settings.vision_batch)
    ]
    return batch_of(task, pictures)


@torch.no_grad()
def accuracy(model: MllamaForConditionalGeneration, heads: Heads, task: Task[Any]) -> dict[str, float]:
    """Return how often the heads are right on validation pictures: of patches, those that show something."""
    nothing = {name: head.nothing for name, head in (*task.patches.items(), *task.whole.items())}
    right, asked = dict.fromkeys(nothing, 0), dict.fromkeys(nothing, 0)
    count = task.settings.validation_pictures
    for start in range(0, count, _JUDGED_AT_ONCE):
        numbers = range(start, min(start + _JUDGED_AT_ONCE, count))
        batch = batch_of(
            task, [task.draw("validation", np.random.default_rng([_VALIDATION, one])) for one in numbers]
        )
        with autocast(task.settings):
            said = heads(encode(model, batch))
        for name, logits in said.items():
            labels = batch[name]
            counted = labels != IGNORE
            if nothing[name] is not None:
                counted &= labels != nothing[name]
            right[name] += int((logits.argmax(-1) == labels)[counted].sum())
            asked[name] += int(counted.sum())
    return {name: right[name] / max(1, asked[name]) for name in right}


def train(model: MllamaForConditionalGeneration, heads: Heads, task: Task[Any], folder: Path) -> dict[str, float]:
    """Run the stage and return the accuracy of its heads on the validation split."""
    model.config.vision_config._attn_implementation = attention.NAME
    settings = task.settings
    modules: dict[str, nn.Module] = {"vision": model.model.vision_model, "heads": heads}
    if task.speaks:
        modules["projector"] = model.model.multi_modal_projector
    stage = Stage("vision", folder, settings, settings.vision_steps, modules)
    stage.run(
        lambda step: draw(task, step),
        lambda batch: loss_of(task, heads, encode(model, batch), batch),
    )
    return accuracy(model, heads, task) | {"seconds": stage.seconds}
