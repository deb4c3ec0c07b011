"""What the kernels of scoring and of the greedy choice take on a GPU, in torch and in Triton; part of suite "gpu"."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import crosstrim
from crosstrim.bench import shapes
from crosstrim.bench.saliency import evidence_of
from crosstrim.bench.timing import Timing, alternate, now
from crosstrim.method import policies
from crosstrim.method.kernels.asked import VARIABLE

Row = dict[str, Any]
POLICIES = ("contribution", "dpp")
FITS, NOT_REACHED = "fits", "not reached in time"


@torch.no_grad()
def run(
    shape: shapes.Shape, device: str, rows: list[int], keeps: list[int], rounds: int, deadline: float
) -> Iterator[Row]:
    """Measure one picture.

    Args:
        shape: of the first cross-attention layer.
        device: to run on.
        rows: T of the texts that score, in bfloat16.
        keeps: how many features are chosen.
        rounds: measured runs of each.
        deadline: on `time.monotonic`, after which nothing new is begun.

    Yields:
        For each text and kernel the milliseconds of scoring ("score"), for each number of features, policy and kernel
        those of choosing ("choose"). `way` is the kernel; Triton's are left out where Triton is not installed.
    """
    ways = [
        "torch",
        *(["triton"] if torch.device(device).type == "cuda" and importlib.util.find_spec("triton") else []),
    ]
    common = {"shape": shape.name, "tiles": shape.tiles_per_image, "batch": 1}
    for count in rows:
        work = partial(crosstrim.saliency, *_asked(shape, count, device))
        for found in _timed(work, ways, device, rounds, deadline):
            yield {"what": "score", **common, "rows": count, **found}
    for keep in keeps:
        evidence = evidence_of(shape, keep, device)
        for name in POLICIES:
            for found in _timed(partial(policies.voter(name), evidence), ways, device, rounds, deadline):
                yield {"what": "choose", **common, "trim": f"{name} keep={keep}", **found}


def _timed(work: Callable[[], object], ways: list[str], device: str, rounds: int, deadline: float) -> Iterator[Row]:
    """Of each kernel, the median milliseconds of some work."""
    if time.monotonic() > deadline:
        yield from ({"way": way, "status": NOT_REACHED} for way in ways)
        return

    def seconds(way: str) -> float:
        with patch.dict(os.environ, {VARIABLE: way}):
            begun = now(torch.device(device))
            work()
            return now(torch.device(device)) - begun

    turns = alternate({way: partial(seconds, way) for way in ways}, rounds=rounds)
    for way in ways:
        yield {"way": way, "status": FITS, "ms_per_image": round(Timing.of(turns[way]).median * 1e3, 3)}


def _asked(shape: shapes.Shape, rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and visibility by tile, as a prompt has them."""
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    queries = torch.randn(1, shape.query_heads, rows, shape.head_size, **like)
    keys = torch.randn(1, shape.key_value_heads, shape.features_per_image, shape.head_size, **like)
    return queries, keys, torch.ones(1, rows, shape.tiles_per_image, dtype=torch.bool, device=device)
