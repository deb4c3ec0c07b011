"""What crosstrim's own code costs in a forward pass: the time inside it that is not the layers' own attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from crosstrim.bench.timing import Stopwatch, now
from crosstrim.models.interface import Call
from crosstrim.trimming.passes import ImagePass, TextPass


@contextlib.contextmanager
def inside_hooks(
    model: nn.Module, put_on: Callable[..., contextlib.AbstractContextManager[Any]], **options: Any
) -> Iterator[Stopwatch]:
    """Put hooks on a model for the length of the block, and measure the time inside them.

    Where a pass attends, what counts is all but the attention itself, which the model's own code would do otherwise.

    Args:
        model: an Mllama.
        put_on: `crosstrim.trim`, or anything else that returns a context manager and registers hooks.
        **options: of `put_on`.
    """
    watch, device = Stopwatch(), next(model.parameters()).device

    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = now(device)
            try:
                return hook(*args, **kwargs)
            finally:
                watch.seconds += now(device) - begun

        return call

    tables: list[dict[int, Any]] = [table for module in model.modules() for table in _hooks(module)]
    already = [set(table) for table in tables]
    with (
        put_on(model, **options),
        patch.object(ImagePass, "attend", timed(ImagePass.attend)),
        patch.object(TextPass, "attend", timed(TextPass.attend)),
        patch.object(Call, "attend", _untimed(Call.attend, watch, device)),
    ):
        for table, before in zip(tables, already, strict=True):
            # By the key, under which the hook is taken off again.
            table.update({key: timed(hook) for key, hook in table.items() if key not in before})
        yield watch


def _untimed(attend: Callable[..., Any], watch: Stopwatch, device: torch.device) -> Callable[..., Any]:
    """Attention that takes its own time off the watch."""

    @wraps(attend)
    def call(*args: Any) -> Any:
        begun = now(device)
        try:
            return attend(*args)
        finally:
            watch.seconds -= now(device) - begun

    return call


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_pre_hooks, module._forward_hooks
