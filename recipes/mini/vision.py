"""Stage one: the vision encoder learns to say, for every patch, which digit it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration

from . import attention
from .pictures import COLOURS, FEWEST, IGNORE, MOST, PLACES, Scene, crowd, layout_id, patch_labels, scene, to_tiles
from .settings import LAYOUTS, MAX_TILES, Settings
from .training import Stage, autocast

_CLASSES = {"digit": 11, "colour": len(COLOURS) + 1, "rank": MOST + 1, "place": len(PLACES)}
_WEIGHTS = {"digit": 1.0, "colour": 0.5, "rank": 0.5, "place": 0.2}
_COUNT_WEIGHT = 0.2
_CROWDED_SHARE = 0.6
_FULL_LAYOUTS = tuple(layout for layout in LAYOUTS if layout[0] * layout[1] == MAX_TILES)


class Heads(nn.Module):
    """What the encoder is asked of every patch while it trains; thrown away afterwards."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        features = settings.vision_width * (1 + len(settings.vision_intermediate))
        self.patches = nn.ModuleDict({name: nn.Linear(features, classes) for name, classes in _CLASSES.items()})
        self.count = nn.Linear(features, MOST - FEWEST + 1)


def image_inputs(scenes: list[Scene]) -> dict[str, Tensor]:
    """Return the model's image inputs for a batch of scenes, one each: bytes, to be scaled by `encode`."""
    tiles = np.stack([to_tiles(item.pixels, item.layout) for item in scenes])
    present = [[index < item.layout[0] * item.layout[1] for index in range(MAX_TILES)] for item in scenes]
    return {
        "tiles": torch.from_numpy(tiles),
        "aspect_ratio_ids": torch.tensor([[layout_id(item.layout)] for item in scenes]),
        "aspect_ratio_mask": torch.tensor(present).long()[:, None],
    }


def encode(model: MllamaForConditionalGeneration, images: dict[str, Tensor]) -> Tensor:
    """Return the vision features [B, MAX_TILES, 1 + patches, features], before the projector."""
    mask = images["aspect_ratio_mask"]
    pixels = images["tiles"].permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    # The processor pads with zeros after scaling.
    pixels = pixels * mask[:, 0, :, None, None, None]
    vision = model.model.vision_model
    return vision(pixels[:, None], images["aspect_ratio_ids"], mask).last_hidden_state[:, 0]


def lesson(settings: Settings, step: int) -> dict[str, Tensor]:
    """Draw the batch of one step: crowds, and ever more ordinary pictures among them."""
    rng = np.random.default_rng([settings.seed, 1, step])
    progress = step / settings.vision_steps
    crowded = 1.0 if progress < 0.4 else _CROWDED_SHARE
    # Digits on the corners of the patch grid are read soon; from there the encoder learns to read them anywhere.
    looseness = float(np.interp(progress, (0.0, 0.5), (0.1, 0.5)))
    scenes = []
    for _ in range(settings.vision_batch):
        if rng.random() < crowded:
            scenes.append(draw_crowd(rng, looseness))
        else:
            scenes.append(scene("train", LAYOUTS[rng.integers(len(LAYOUTS))], rng))
    return image_inputs(scenes) | labels_of(scenes)


def draw_crowd(rng: np.random.Generator, looseness: float = 0.5) -> Scene:
    """Draw a training crowd, mostly on four tiles: padding tiles cost as much as real ones."""
    layouts = _FULL_LAYOUTS if rng.random() < 0.7 else LAYOUTS
    return crowd("train", layouts[rng.integers(len(layouts))], rng, looseness)


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """Return what the heads should say of each scene."""
    patches = [patch_labels(item) for item in scenes]
    labels = {name: torch.from_numpy(np.stack([one[name] for one in patches])) for name in _CLASSES}
    ordinary = [bool(item.digits and item.digits[0].place) for item in scenes]
    counts = [len(item.digits) - FEWEST if known else IGNORE for item, known in zip(scenes, ordinary, strict=True)]
    return labels | {"count": torch.tensor(counts)}


def loss_of(heads: Heads, features: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Return the summed loss of all heads, and each one's to watch."""
    logits = {name: head(features[:, :, 1:]) for name, head in heads.patches.items()}
    counted = heads.count(features[:, 0, 0])
    losses = {
        name: F.cross_entropy(
            value.float().flatten(0, -2), batch[name].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        / (batch[name] != IGNORE).sum().clamp(min=1)
        for name, value in logits.items()
    }
    count = F.cross_entropy(counted.float(), batch["count"], ignore_index=IGNORE, reduction="sum")
    count = count / (batch["count"] != IGNORE).sum().clamp(min=1)
    total = sum((_WEIGHTS[name] * loss for name, loss in losses.items()), _COUNT_WEIGHT * count)
    figures = {name: loss.item() for name, loss in losses.items()} | {"count": count.item()}
    return total, figures


@torch.no_grad()
def accuracy(model: MllamaForConditionalGeneration, heads: Heads, split: str, settings: Settings) -> dict[str, float]:
    """Return how often the patch at a digit's centre tells it right, on ordinary pictures of one split."""
    pictures = settings.validation_pictures
    rng = np.random.default_rng([11, pictures])
    right = {"digit": 0, "colour": 0, "rank": 0, "place": 0, "count": 0}
    digits = 0
    for start in range(0, pictures, 16):
        scenes = [
            scene(split, LAYOUTS[(start + index) % len(LAYOUTS)], rng) for index in range(min(16, pictures - start))
        ]
        with autocast(settings):
            features = encode(model, image_inputs(scenes))
            says = {name: head(features[:, :, 1:]).argmax(-1) for name, head in heads.patches.items()}
            counts = heads.count(features[:, 0, 0]).argmax(-1)
        for index, item in enumerate(scenes):
            right["count"] += int(counts[index] == len(item.digits) - FEWEST)
            for rank, digit in enumerate(item.digits):
                tile, patch = _patch_at(digit.centre, item.layout)
                truth = {"digit": digit.value, "colour": list(COLOURS).index(digit.colour)}
                truth |= {"rank": rank, "place": PLACES.index(digit.place)}
                for name, value in truth.items():
                    right[name] += int(says[name][index, tile, patch] == value)
                digits += 1
    return {name: value / (pictures if name == "count" else digits) for name, value in right.items()}


def _patch_at(centre: tuple[float, float], layout: tuple[int, int]) -> tuple[int, int]:
    from .settings import PATCH, TILE

    (tile_x, x), (tile_y, y) = (divmod(int(value), TILE) for value in centre)
    return tile_y * layout[1] + tile_x, y // PATCH * (TILE // PATCH) + x // PATCH


def train(model: MllamaForConditionalGeneration, heads: Heads, settings: Settings, folder: Path) -> dict[str, float]:
    """Run the stage and return the accuracy of its heads on the validation split."""
    model.config.vision_config._attn_implementation = attention.NAME
    stage = Stage(
        "vision", folder, settings, settings.vision_steps, {"vision": model.model.vision_model, "heads": heads}
    )

    def loss(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        features = encode(model, batch)
        return loss_of(heads, features, batch)

    stage.run(lambda step: lesson(settings, step), loss)
    return accuracy(model, heads, "validation", settings) | {"seconds": stage.seconds}
