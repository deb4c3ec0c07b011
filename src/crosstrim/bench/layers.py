"""Suite "layers": time in the cross-attention layers, untrimmed, trimmed the plain way, and by crosstrim."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache

import crosstrim
from crosstrim import compat
from crosstrim.bench import shapes
from crosstrim.bench.plain import plainly_trimmed
from crosstrim.bench.timing import Timing, alternate, inside
from crosstrim.models import mllama

NARROW = 64
"""Width of the MLPs here, so that a layer's time is its attention's: projections, attention, hooks."""

Trims = dict[str, dict[str, Any]]
"""Options of `crosstrim.trim` by the name of the row."""


@torch.no_grad()
def run(
    shape: shapes.Shape,
    *,
    trims: Trims,
    batch: int = 4,
    rows: int = 256,
    tiles: int | list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounds: int = 9,
    phases: tuple[str, ...] = ("prefill", "decode"),
) -> list[dict[str, Any]]:
    """Measure a leader and two followers.

    Args:
        shape: of the layers.
        trims: what to compare with the untrimmed model.
        batch: B.
        rows: T of the prompt.
        tiles: real tiles per image, of all samples or of each.
        dtype: of weights, features and cache.
        device: to run on.
        rounds: measured runs of each variant.
        phases: "prefill", "decode" or both.

    Returns:
        One row for each phase, trim, way (untrimmed, plain, crosstrim) and layer (leader, followers, all), with
        the time of the layers together, its ratio to the untrimmed one, and the bytes of their cache.
    """
    model = shapes.build(shape, feed_forward=NARROW, dtype=dtype, device=device)
    compat.apply(model)
    inputs = shapes.prompt(shape, batch=batch, rows=rows, tiles=tiles, dtype=dtype, device=device)
    ways = _ways(model, inputs, trims)
    parts = mllama.locate(model)
    groups = {"leader": parts.cross_layers[:1], "followers": parts.followers}
    found = []
    for phase in phases:
        caches = {name: _prefilled(model, way, inputs) for name, way in ways.items()}
        held = {name: _bytes(cache, parts.layer_indices) for name, cache in caches.items()}
        turns = alternate(
            {
                name: partial(_seconds, model, way, groups, _arguments(phase, inputs, caches[name]))
                for name, way in ways.items()
            },
            rounds=rounds,
        )
        for layer in (*groups, "all"):
            timings = {name: Timing.of([one[layer] for one in turns[name]]) for name in ways}
            found += [
                {"phase": phase, "layer": layer, "way": way, "trim": trim}
                | timings[way, trim].to_dict()
                | {
                    "ratio": round(timings[way, trim].median / timings["untrimmed", ""].median, 4),
                    "kv_bytes": held[way, trim],
                    "kv_ratio": round(held[way, trim] / held["untrimmed", ""], 4),
                }
                for way, trim in ways
            ]
    common = {"suite": "layers", "shape": shape.name, "batch": batch, "rows": rows, "tiles": tiles}
    return [common | {"dtype": str(dtype).removeprefix("torch."), "device": device} | row for row in found]


Name = tuple[str, str]
Way = Callable[[], contextlib.AbstractContextManager[Any]]


def _ways(model: nn.Module, inputs: dict[str, torch.Tensor], trims: Trims) -> dict[Name, Way]:
    ways: dict[Name, Way] = {("untrimmed", ""): contextlib.nullcontext}
    for name, options in trims.items():
        with crosstrim.trim(model, **options) as trimmed:
            model(**inputs, past_key_values=DynamicCache(config=cast(Any, model).config.text_config))
            report = trimmed.report()
        ways["plain", name] = partial(plainly_trimmed, model, report)
        ways["crosstrim", name] = partial(crosstrim.trim, model, **options)
    return ways


def _prefilled(model: nn.Module, way: Way, inputs: dict[str, torch.Tensor]) -> DynamicCache:
    cache = DynamicCache(config=cast(Any, model).config.text_config)
    with way():
        model(**inputs, past_key_values=cache)
    return cache


def _arguments(phase: str, inputs: dict[str, torch.Tensor], cache: DynamicCache) -> Callable[[], dict[str, Any]]:
    """What makes the arguments of one forward pass: of the prompt with a new cache, or of one token more."""
    if phase == "prefill":
        return lambda: {**inputs, "past_key_values": DynamicCache()}
    return lambda: {**shapes.next_token(inputs, cache.get_seq_length()), "past_key_values": cache}


def _seconds(
    model: nn.Module,
    way: Way,
    groups: dict[str, tuple[nn.Module, ...]],
    arguments: Callable[[], dict[str, Any]],
) -> dict[str, float]:
    """Of one forward pass, the seconds inside each group of layers and inside all of them."""
    with torch.no_grad(), way(), contextlib.ExitStack() as stack:
        watches = {name: stack.enter_context(inside(layers)) for name, layers in groups.items()}
        model(**arguments())
    seconds = {name: watch.seconds for name, watch in watches.items()}
    return seconds | {"all": sum(seconds.values())}


def _bytes(cache: DynamicCache, indices: tuple[int, ...]) -> int:
    return sum(cache.layers[index].keys.nbytes + cache.layers[index].values.nbytes for index in indices)
