"""What enters the vision tower, counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """A list that grows by the number of images of every pass inside the block."""
    passes: list[int] = []
    hook = model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    try:
        yield passes
    finally:
        hook.remove()
