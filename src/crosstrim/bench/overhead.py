"""What crosstrim's own code costs in a forward pass: the time inside its hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, cast

from torch import nn

from crosstrim.bench.timing import Stopwatch, now
from crosstrim.models import mllama


@contextlib.contextmanager
def inside_hooks(
    model: nn.Module, put_on: Callable[..., contextlib.AbstractContextManager[Any]], **options: Any
) -> Iterator[Stopwatch]:
    """Put hooks on a model for the length of the block, and measure the time inside them.

    Hooks before an output projection do not count: what these do is the layer's attention itself, which the model's
    own code would do otherwise.

    Args:
        model: an Mllama.
        put_on: `crosstrim.trim`, or anything else that returns a context manager and registers hooks.
        **options: of `put_on`.
    """
    watch, device = Stopwatch(), next(model.parameters()).device
    projections = {cast(Any, layer).cross_attn.o_proj for layer in mllama.locate(model).cross_layers}

    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = now(device)
            try:
                return hook(*args, **kwargs)
            finally:
                watch.seconds += now(device) - begun

        return call

    tables: list[dict[int, Any]] = [
        table for module in model.modules() if module not in projections for table in _hooks(module)
    ]
    already = [set(table) for table in tables]
    with put_on(model, **options):
        for table, before in zip(tables, already, strict=True):
            # By the key, under which the hook is taken off again.
            table.update({key: timed(hook) for key, hook in table.items() if key not in before})
        yield watch


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_pre_hooks, module._forward_hooks
