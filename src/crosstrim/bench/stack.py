"""Suite "stack": a whole period of the 11B decoder, prompt and step, beside what bytes and operations predict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

from crosstrim.bench import layers, shapes
from crosstrim.bench.timing import Timing, alternate, inside, now
from crosstrim.models import compat, mllama

Row = dict[str, Any]

KEEPS = {"keep=0.5": {"keep": 0.5}, "keep=0.25": {"keep": 0.25}, "keep=0.1": {"keep": 0.1}}
FLOOR = "one feature"
TRIMS: dict[str, dict[str, Any]] = {
    "lossless": {},
    **KEEPS,
    "keep=0.5, int8": {"keep": 0.5, "kv_dtype": "int8"},
    FLOOR: {"keep": 1},
}
WITHOUT_PLAIN = ("keep=0.5, int8", FLOOR)

_HERE, _RELEASED = {"dtype": "float32"}, {"dtype": "bfloat16"}  # Llama-3.2-Vision was released in bfloat16
_PROMPT, _STEP = {"phase": "prompt", "batches": [1], "rounds": 1}, {"phase": "step", "rounds": 3}

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {
        "shape": "11B",
        "cases": [
            {**_HERE, **_STEP, "tiles": 4, "rows": 64, "batches": [1, 4, 16, 32]},
            {**_HERE, **_STEP, "tiles": 1, "rows": 64, "batches": [1, 16]},
        ],
    },
    "quick": {
        "shape": "11B",
        "cases": [{**_HERE, **_STEP, "tiles": 4, "rows": 64, "batches": [1, 16], "rounds": 2}],
    },
    "tiny": {
        "shape": "tiny",
        "cases": [
            {**_HERE, **_PROMPT, "tiles": 4, "rows": 9, "rounds": 1},
            {**_HERE, **_STEP, "tiles": 4, "rows": 64, "batches": [1, 16], "rounds": 1},
            {**_RELEASED, **_STEP, "tiles": 1, "rows": 64, "batches": [2], "rounds": 1},
        ],
    },
}
PERIODS = 8
"""How often the period stands in the 11B decoder; its first cross-attention layer is the leader."""


def run(shape: str, cases: list[dict[str, Any]]) -> Iterator[Row]:
    """Measure four self-attention layers, the leader and one follower.

    The decoder is eight periods of four self-attention layers and one cross-attention layer, the first of which is
    the leader. So its time is that of eight times the four, the leader and seven times the follower, and a period's
    is an eighth of it.

    Args:
        shape: name of their shape.
        cases: of each the dtype of the weights, and arguments of `measure`.

    Yields:
        The rows of `measure`.
    """
    sizes = shapes.SHAPES[shape]
    for dtype, alike in groupby(cases, key=lambda case: case["dtype"]):
        model = shapes.build(sizes, self_layers=4, cross_layers=2, dtype=getattr(torch, dtype))
        compat.apply(model)
        for case in alike:
            yield from measure(model, sizes, **{name: value for name, value in case.items() if name != "dtype"})


@torch.no_grad()
def measure(
    model: nn.Module, sizes: shapes.Shape, *, phase: str, tiles: int, rows: int, batches: list[int], rounds: int
) -> Iterator[Row]:
    """Measure one phase, at some batch sizes.

    Args:
        model: of `run`.
        sizes: its shape.
        phase: "prompt" or "step".
        tiles: real tiles of every picture.
        rows: T of the prompt.
        batches: batch sizes, for steps each a multiple of the one before it.
        rounds: measured runs of each variant.

    Yields:
        For each batch size, way and trim the period's time, its ratio to the untrimmed one, the ratio that bytes,
        operations and the floor predict; tokens a second of the whole decoder, and these by GB of its keys and
        values.
    """
    trims = TRIMS if tiles < sizes.tiles_per_image else {name: one for name, one in TRIMS.items() if one}
    dtype = next(model.parameters()).dtype
    like: dict[str, Any] = {"rows": rows, "tiles": tiles, "dtype": dtype}
    inputs = shapes.prompt(sizes, batch=1, **like)
    ways = {
        **layers.make_ways(model, inputs, {name: one for name, one in trims.items() if name not in WITHOUT_PLAIN}),
        **layers.make_ways(model, inputs, {name: trims[name] for name in WITHOUT_PLAIN}, plain=False),
    }
    caches = {name: layers.prefilled(model, way, inputs) for name, way in ways.items()}
    later = mllama.locate(model).layer_indices[-1]
    kept = {name: cache.layers[later].keys.shape[2] for name, cache in caches.items()}
    held = {name: layers.held_bytes(cache, (later,)) for name, cache in caches.items()}
    for before, batch in zip([1, *batches], batches, strict=False):
        if phase == "step":
            for cache in caches.values():
                cache.batch_repeat_interleave(batch // before)
            again = layers.repeated(inputs, batch)
            passes = {name: layers.step(again, cache) for name, cache in caches.items()}
        else:
            passes = dict.fromkeys(ways, layers.new_prompt(shapes.prompt(sizes, batch=batch, **like)))
        turns = alternate(
            {name: partial(seconds, model, way, passes[name]) for name, way in ways.items()}, rounds=rounds, warm_up=1
        )
        timings = {name: Timing.of(turns[name]) for name in ways}
        whole, floor = timings["untrimmed", ""], timings["crosstrim", FLOOR]
        for (way, trim), timing in timings.items():
            share = kept[way, trim] / kept["untrimmed", ""]
            here, then = (
                load(sizes, kept[one], held[one], phase=phase, rows=rows, batch=batch, element=dtype.itemsize)
                for one in ((way, trim), ("untrimmed", ""))
            )
            tokens_per_s = batch / (PERIODS * timing.median)
            yield {
                "shape": sizes.name,
                "dtype": str(dtype).removeprefix("torch."),
                "phase": phase,
                "tiles": tiles,
                "rows": rows,
                "batch": batch,
                "way": way,
                "trim": trim,
                **layers.compared(timing, whole),
                "by_bytes": round((here.weights + here.cached) / (then.weights + then.cached), 4),
                "by_operations": round(here.operations / then.operations, 4),
                "by_floor": round((floor.median + share * (whole.median - floor.median)) / whole.median, 4),
                "tokens_per_s": round(tokens_per_s, 2),
                "kv_gb": round(PERIODS * here.cached / 1e9, 3),
                "tokens_per_s_per_gb": round(tokens_per_s / (PERIODS * here.cached / 1e9), 2),
            }


def seconds(model: nn.Module, way: layers.Way, arguments: Callable[[], dict[str, Any]]) -> float:
    """Of one forward pass of the whole decoder, an eighth: what a period takes."""
    parts = mllama.locate(model)
    stack: Any = parts.model.language_model
    own = tuple(layer for layer in stack.layers if layer not in parts.cross_layers)
    groups = {"self": own, "leader": parts.cross_layers[:1], "follower": parts.followers}
    device = next(model.parameters()).device
    with torch.no_grad(), way(), contextlib.ExitStack() as watched:
        watches = {name: watched.enter_context(inside(modules)) for name, modules in groups.items()}
        given = arguments()
        begun = now(device)
        model(**given)
        whole = now(device) - begun
    spent = {name: watch.seconds for name, watch in watches.items()}
    once = whole - sum(spent.values()) + spent["leader"]
    return spent["self"] + (once + (PERIODS - 1) * spent["follower"]) / PERIODS


@dataclass(frozen=True)
class Load:
    """What a period asks of a machine.

    Attributes:
        weights: bytes of the weights.
        cached: bytes of keys and values, of text and of images.
        operations: multiplications and additions.
    """

    weights: float
    cached: float
    operations: float


def load(sizes: shapes.Shape, kept: int, held: int, *, phase: str, rows: int, batch: int, element: int) -> Load:
    """What a period asks of a machine. Ours; scoring is left out, since it is what the others are compared with.

    Args:
        sizes: of the model.
        kept: features that a later cross-attention layer holds of one sample.
        held: bytes that they take there.
        phase: "prompt" or "step".
        rows: T of the prompt.
        batch: samples.
        element: bytes of a number.
    """
    hidden, pair = sizes.hidden, 2 * sizes.key_value_heads * sizes.head_size  # numbers of a key and its value
    dense = 2 * hidden * hidden + 3 * hidden * sizes.feed_forward  # queries, output and the MLP
    weights = 5 * dense + 4 * hidden * pair
    read = float(kept)
    here = rows if phase == "prompt" else 1
    operations = 2.0 * here * weights
    if phase == "prompt":
        read = ((PERIODS - 1) * kept + sizes.features_per_image) / PERIODS  # the leader reads every feature
        weights += hidden * pair
        operations += 2 * hidden * pair * read
    operations += here * 4 * sizes.query_heads * sizes.head_size * (4 * rows + read)
    return Load(element * weights, batch * (held + 4 * rows * element * pair), batch * operations)
