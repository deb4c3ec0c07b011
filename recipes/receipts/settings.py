"""Every number that shapes the model, its pages and its training."""

from __future__ import annotations

from recipes.training.settings import Settings

SETTINGS = Settings(
    seed=20251130,
    precision="float32",
    patch=12,
    text_width=256,
    text_heads=16,
    text_key_heads=4,
    vision_steps=2500,
    language_steps=600,
    joint_steps=2200,
    joint_crowds=2,
    segments=10,
)

TILE, PATCH = SETTINGS.tile, SETTINGS.patch

SMOKE = Settings(
    seed=20251130,
    precision="float32",
    patch=12,
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
