"""Every number that shapes the embedded model, its pictures and its training."""

from __future__ import annotations

from recipes.training.settings import Settings

SETTINGS = Settings()
"""What the shipped model was made with, but for the precision of another processor."""

TILE, PATCH = SETTINGS.tile, SETTINGS.patch

SMOKE = Settings(
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
"""A run of two steps a stage, to test that the recipe runs at all."""
