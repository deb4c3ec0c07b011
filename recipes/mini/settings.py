"""Every number that shapes the embedded model, its pictures and its training."""

from __future__ import annotations

from recipes.training.settings import Settings, smoke

SETTINGS = Settings()
"""What the shipped model was made with, but for the precision of another processor."""

TILE, PATCH = SETTINGS.tile, SETTINGS.patch

SMOKE = smoke(SETTINGS)
