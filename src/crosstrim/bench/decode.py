"""Suite "decode": time of a decoding step in the cross-attention layers, against what is kept and the batch size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from crosstrim.bench import layers, shapes
from crosstrim.bench.timing import Timing, alternate
from crosstrim.models import compat, mllama

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"shape": "11B", "keeps": [0.5, 0.25, 0.1], "batches": [1, 2, 4, 8], "rounds": 9},
    "quick": {"shape": "11B", "keeps": [0.5, 0.1], "batches": [1, 4], "rounds": 3, "plain": False},
    "tiny": {"shape": "tiny", "keeps": [0.5, 0.1], "batches": [1, 2, 4], "rounds": 2},
}


@torch.no_grad()
def run(
    shape: str, keeps: list[float], batches: list[int], rounds: int, plain: bool = True
) -> Iterator[dict[str, Any]]:
    """Measure a leader and two followers.

    Args:
        shape: name of their shape.
        keeps: kept shares beside all.
        batches: batch sizes, each a multiple of the one before it.
        rounds: measured steps of each variant.
        plain: whether to trim the plain way as well.

    Yields:
        One row for each batch size, kept share and way, with the time of all layers in one step, its ratio to the
        untrimmed one, and the bytes of their cache.
    """
    sizes = shapes.SHAPES[shape]
    model = shapes.build(sizes, feed_forward=layers.NARROW)
    compat.apply(model)
    parts = mllama.locate(model)
    # Every sample has the same picture: it runs once, and its cache is repeated.
    inputs = shapes.prompt(sizes, batch=1, rows=8)
    ways = layers.make_ways(model, inputs, {f"keep={keep}": {"keep": keep} for keep in keeps}, plain)
    kept = {"": 1.0} | {f"keep={keep}": keep for keep in keeps}
    caches = {name: layers.prefilled(model, way, inputs) for name, way in ways.items()}
    for before, batch in zip([1, *batches], batches, strict=False):
        for cache in caches.values():
            cache.batch_repeat_interleave(batch // before)
        batched = layers.repeated(inputs, batch)
        groups = {"cross": parts.cross_layers}
        turns = alternate(
            {
                name: partial(layers.seconds_inside, model, way, groups, layers.step(batched, caches[name]))
                for name, way in ways.items()
            },
            rounds=rounds,
        )
        timings = {name: Timing.of([one["all"] for one in turns[name]]) for name in ways}
        for way, trim in ways:
            yield {
                "shape": shape,
                "batch": batch,
                "way": way,
                "kept": kept[trim],
                **layers.compared(timings[way, trim], timings["untrimmed", ""]),
                "kv_bytes": layers.held_bytes(caches[way, trim], parts.layer_indices),
            }
