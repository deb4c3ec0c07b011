"""Every number that shapes a model and its training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

MAX_TILES = 4
LAYOUTS: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
"""Rows and columns of tiles, in the processor's own order: an aspect ratio id is an index here, plus one."""


@dataclass(frozen=True)
class Settings:
    """What a run of the recipe uses; two runs with equal settings make equal weights on equal hardware."""

    seed: int = 20250404
    precision: str = "bfloat16"
    """What layers multiply in while training: bfloat16 under autocast, or float32."""

    tile: int = 120
    """Side of a tile in pixels."""
    patch: int = 15
    """Side of a patch in pixels; (tile / patch)**2 + 1 must not be a multiple of 8 (it would be masked whole)."""
    vision_width: int = 128
    vision_heads: int = 2
    vision_layers: int = 6
    vision_global_layers: int = 2
    vision_intermediate: tuple[int, ...] = (1, 3, 5)
    text_width: int = 192
    text_mlp: int = 512
    text_layers: int = 9
    text_heads: int = 8
    text_key_heads: int = 4
    cross_layers: tuple[int, ...] = (3, 5, 7)

    vision_steps: int = 2000
    vision_batch: int = 8
    crowded: float = 0.6
    """How many of the first stage's pictures are crowds, once ordinary ones have joined them."""
    language_steps: int = 600
    joint_steps: int = 2500
    reading_from: int = 1200
    language_batch: int = 8
    joint_crowds: int = 4
    segments: int = 14
    muon_rate: float = 0.02
    adam_rate: float = 7e-4
    joint_scale: float = 0.5
    checkpoint_every: int = 200
    validation_pictures: int = 160

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self)


def smoke(settings: Settings) -> Settings:
    """Return a run of two steps a stage on a tiny model, to test that a recipe runs at all."""
    return replace(
        settings,
        vision_batch=2,
        language_batch=2,
        vision_width=64,
        vision_heads=1,
        text_width=64,
        text_mlp=64,
        vision_steps=2,
        language_steps=2,
        joint_steps=2,
        joint_crowds=1,
        segments=4,
        checkpoint_every=1,
        validation_pictures=2,
    )
