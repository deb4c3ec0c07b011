"""Every number that shapes the model, its pages and its training."""

from __future__ import annotations

from recipes.training.settings import Settings, smoke

SETTINGS = Settings(
    seed=20251130,
    precision="float32",
    patch=12,
    text_width=256,
    text_heads=16,
    text_key_heads=4,
    vision_steps=2200,
    crowded=0.3,
    language_steps=700,
    joint_steps=1200,
    joint_crowds=2,
    segments=10,
)

TILE, PATCH = SETTINGS.tile, SETTINGS.patch

SMOKE = smoke(SETTINGS)
