"""Suite "growth": how time and memory of choosing, of a prompt and of a step grow with images, rows and the batch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

import crosstrim
from crosstrim import TrimConfig
from crosstrim.bench import layers, shapes
from crosstrim.bench.peak import ALL_RETURNED, apart, peak_mib
from crosstrim.bench.timing import Timing, cpu_seconds
from crosstrim.method.choose import choose
from crosstrim.models import compat, mllama

Row = dict[str, Any]
Point = dict[str, Any]

WHATS = ("choose", "prompt", "step")
TRIM: dict[str, Any] = {"keep": 0.1}
BASE: Point = {"images": 1, "rows": 64, "batch": 1}

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {
        "shape": "eighth",
        "along": {"images": [1, 2, 4, 8, 16], "rows": [64, 256, 1024, 4096], "batch": [1, 2, 4, 8, 16]},
        "rounds": 5,
    },
    "quick": {"shape": "eighth", "along": {"images": [1, 4], "rows": [64, 256], "batch": [1, 4]}, "rounds": 2},
    "tiny": {"shape": "tiny", "along": {"images": [1, 2, 4], "rows": [64, 256], "batch": [1, 4]}, "rounds": 1},
}


@torch.no_grad()
def run(shape: str, along: dict[str, list[int]], rounds: int) -> Iterator[Row]:
    """Measure a leader and two followers, in float32.

    Args:
        shape: name of their shape.
        along: of each size the values to take, while the others stay as in `BASE`.
        rounds: measured runs of each point; memory is measured once, in a process of its own.

    Yields:
        For each thing measured, size and value: the time, the memory needed at its peak above what was there
        before (None where the system is not Linux), and the slopes of both: by which power of the size they have
        grown since it was a quarter of this or less. Time is the CPU's of choosing alone, or the clock's inside
        the cross-attention layers.
    """
    points = [(size, BASE | {size: value}) for size, values in along.items() for value in values]
    asked = json.dumps([point for _, point in points])
    peaks = apart(__name__, shape, asked, doing="measures memory", **ALL_RETURNED)
    model = _model(shape)
    before: dict[tuple[str, str], list[Row]] = {}
    for (size, point), peak in zip(points, peaks, strict=True):
        works = _works(model, shapes.SHAPES[shape], point)
        for what, work in works.items():
            work()
            seconds = [work() for _ in range(rounds)]
            row = {
                "shape": shape,
                "what": what,
                "along": size,
                "value": point[size],
                **Timing.of(seconds).to_dict(),
                "peak_mib": peak[what],
            }
            earlier = before.setdefault((what, size), [])
            yield row | {"time_slope": slope(earlier, row, "ms"), "memory_slope": slope(earlier, row, "peak_mib")}
            earlier.append(row)


def slope(earlier: Sequence[Mapping[str, Any]], row: Mapping[str, Any], field: str) -> float | None:
    """By which power of `value` a field has grown since the value was a quarter or less; None if it never was."""
    since = [one for one in earlier if 4 * one["value"] <= row["value"]]
    if not since or row[field] is None:
        return None
    smallest = {"ms": 1.0, "peak_mib": 4.0}[field]  # less than that says nothing
    grown = max(row[field], smallest) / max(since[-1][field], smallest)
    return round(math.log(grown) / math.log(row["value"] / since[-1]["value"]), 3)


def _model(shape: str) -> Any:
    model = shapes.build(shapes.SHAPES[shape], feed_forward=layers.NARROW)
    compat.apply(model)
    return model


def _works(model: Any, shape: shapes.Shape, point: Point) -> dict[str, Callable[[], float]]:
    """What does each thing once, and returns its CPU seconds."""
    inputs = shapes.prompt(shape, **point)
    way = partial(crosstrim.trim, model, **TRIM)
    groups = {"cross": mllama.locate(model).cross_layers}
    step = layers.step(inputs, layers.prefilled(model, way, inputs))
    asked = _asked(shape, **point)
    return {
        "choose": lambda: cpu_seconds(lambda: choose(*asked, config=TrimConfig(**TRIM), geometry=shape)),
        "prompt": lambda: layers.seconds_inside(model, way, groups, layers.new_prompt(inputs))["all"],
        "step": lambda: layers.seconds_inside(model, way, groups, step)["all"],
    }


def _asked(
    shape: shapes.Shape, *, images: int, rows: int, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values and visibility of such a prompt."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(batch, shape.query_heads, rows, shape.head_size, generator=generator)
    features = (batch, shape.key_value_heads, images * shape.features_per_image, shape.head_size)
    keys, values = (torch.randn(features, generator=generator) for _ in range(2))
    return queries, keys, values, torch.ones(batch, rows, images * shape.tiles_per_image, dtype=torch.bool)


def _measure_peaks(shape: str, points: list[Point]) -> list[dict[str, float | None]]:
    """Of each point and thing the peak, in a process that returns what it does not need."""
    torch.set_num_threads(1)
    model, found = _model(shape), []
    _works(model, shapes.SHAPES[shape], BASE)["prompt"]()  # what the libraries take for themselves, once
    for point in points:
        works = _works(model, shapes.SHAPES[shape], point)
        found.append({what: peak_mib(work)[1] for what, work in works.items()})
    return found


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps(_measure_peaks(sys.argv[1], json.loads(sys.argv[2]))))
