"""Suite "saliency": what scoring and choosing cost: time and memory of each, and their part in the layer's prompt."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

import crosstrim
from crosstrim.bench import layers, shapes
from crosstrim.bench.peak import ALL_RETURNED, apart, peak_mib
from crosstrim.bench.timing import Timing, alternate, cpu_seconds
from crosstrim.method import policies
from crosstrim.models import compat, mllama

POLICIES = ("union", "contribution", "mmr", "dpp")
_CHOICES = [(640, POLICIES), (3202, ("contribution",))]
_LEADS = [("float32", 64), ("float32", 512), ("float32", 2048), ("bfloat16", 64)]

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {
        "shape": "11B",
        "rows": [32, 128, 512, 2048, 4096],
        "scorings": 3,
        "keeps": _CHOICES,
        "choices": 9,
        "leads": _LEADS,
        "rounds": 3,
    },
    "quick": {
        "shape": "11B",
        "rows": [32, 512, 4096],
        "scorings": 1,
        "keeps": _CHOICES,
        "choices": 3,
        "leads": _LEADS,
        "rounds": 1,
    },
    "tiny": {
        "shape": "tiny",
        "rows": [8, 16],
        "scorings": 1,
        "keeps": [(20, POLICIES), (40, ("contribution",))],
        "choices": 2,
        "leads": [("float32", 8)],
        "rounds": 1,
    },
}
TRIM: dict[str, Any] = {"k": 0.25}


def run(
    shape: str,
    rows: list[int],
    scorings: int,
    keeps: list[tuple[int, tuple[str, ...]]],
    choices: int,
    leads: list[tuple[str, int]],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Measure scoring in processes of their own, choosing, and what both cost the layer. Batch 1.

    Args:
        shape: name of the shape of the first cross-attention layer.
        rows: T, the lengths of the text.
        scorings: measured runs of each length.
        keeps: how many features to choose, and which policies choose so many.
        choices: measured runs of each policy.
        leads: dtypes and T of prompts through the whole layer.
        rounds: measured prompts of each.

    Yields:
        For each length the time of scoring on one core in float32, and two peaks of memory in MiB above inputs and
        result, None where the system is not Linux: `peak_mib` is what is needed at once, `resident_mib` has also what
        the allocator has not yet given back. Then for each policy the CPU time of choosing, on one core. Then for
        each prompt the time in the layer, untrimmed and scoring, and its ratio.

    Raises:
        CrosstrimError: a process that measures fails.
    """
    for count in rows:
        timed = apart(__name__, shape, count, scorings, doing=f"scores {count} rows")
        needed = apart(__name__, shape, count, 0, doing=f"scores {count} rows", **ALL_RETURNED)["resident_mib"]
        yield {"what": "score", "shape": shape, "rows": count, **timed, "peak_mib": needed}
    sizes = shapes.SHAPES[shape]
    for keep, names in keeps:
        evidence = evidence_of(sizes, keep)
        turns = alternate(
            {name: partial(_choose, policies.voter(name), evidence, keep) for name in names}, rounds=choices
        )
        for name in names:
            common = {"what": "choose", "shape": shape, "policy": name, "kept": keep, "of": sizes.features_per_image}
            yield common | Timing.of(turns[name]).to_dict()
    for dtype, prompts in groupby(leads, key=lambda lead: lead[0]):
        model = shapes.build(sizes, cross_layers=1, feed_forward=layers.NARROW, dtype=getattr(torch, dtype))
        compat.apply(model)
        for _, count in prompts:
            yield from _lead(model, sizes, count, rounds)


@torch.no_grad()
def _lead(model: nn.Module, sizes: shapes.Shape, count: int, rounds: int) -> Iterator[dict[str, Any]]:
    dtype = next(model.parameters()).dtype
    inputs = shapes.prompt(sizes, batch=1, rows=count, dtype=dtype)
    ways: dict[str, layers.Way] = {"untrimmed": nullcontext, "crosstrim": partial(crosstrim.trim, model, **TRIM)}
    groups = {"leader": mllama.locate(model).cross_layers}
    runs = {
        way: partial(layers.seconds_inside, model, on, groups, layers.new_prompt(inputs)) for way, on in ways.items()
    }
    turns = alternate(runs, rounds=rounds, warm_up=1)
    timings = {way: Timing.of([one["leader"] for one in found]) for way, found in turns.items()}
    for way, timing in timings.items():
        common = {"what": "lead", "shape": sizes.name, "dtype": str(dtype).removeprefix("torch."), "rows": count}
        yield common | {"way": way} | layers.compared(timing, timings["untrimmed"])


def evidence_of(shape: shapes.Shape, keep: int, device: str = "cpu") -> policies.Evidence:
    """What a policy goes by in one picture of this shape, of which `keep` features stay; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    count, size = shape.features_per_image, shape.head_size
    logits = 3 * torch.randn(1, shape.query_heads, count, generator=generator)  # some heads agree, none is sure
    keys, values = (torch.randn(1, shape.key_value_heads, count, size, generator=generator) for _ in range(2))
    return policies.Evidence(
        saliency=256 * logits.softmax(-1).to(device),
        visible=torch.ones(1, count, dtype=torch.bool, device=device),
        keys=keys.to(device),
        values=values.to(device),
        budget=torch.tensor([[keep]]),
        features_per_image=count,
        features_per_tile=shape.features_per_tile,
    )


def _choose(policy: policies.Policy, evidence: policies.Evidence, keep: int) -> float:
    """CPU seconds of one choice on one core."""
    return cpu_seconds(lambda: crosstrim.select(policy(evidence), evidence.visible, keep=keep))


@torch.no_grad()
def _score(shape: shapes.Shape, rows: int, runs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    size, count = shape.head_size, shape.features_per_image
    queries = torch.randn(1, shape.query_heads, rows, size, generator=generator)
    keys = torch.randn(1, shape.key_value_heads, count, size, generator=generator)
    visible = torch.ones(1, rows, count, dtype=torch.bool)
    # What the libraries take for themselves, once.
    crosstrim.saliency(queries[:, :, :2], keys[:, :, :64], visible[:, :2, :64])
    result, peak = peak_mib(lambda: crosstrim.saliency(queries, keys, visible))
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        crosstrim.saliency(queries, keys, visible)
        seconds.append(time.perf_counter() - begun)
    timing = Timing.of(seconds).to_dict() if seconds else {}
    return timing | {"resident_mib": None if peak is None else round(peak - result.nbytes / 2**20, 1)}


if __name__ == "__main__":
    _shape, _rows, _runs = sys.argv[1:]
    print(json.dumps(_score(shapes.SHAPES[_shape], int(_rows), int(_runs))))
