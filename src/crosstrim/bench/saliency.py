"""Suite "saliency": time and peak memory of scoring against the length of the text, and CPU time of choosing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import crosstrim
from crosstrim.bench import shapes
from crosstrim.bench.timing import Timing, alternate, cpu_seconds
from crosstrim.errors import CrosstrimError
from crosstrim.method import policies

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"shape": "11B", "rows": [32, 128, 512, 2048, 4096], "scorings": 3, "keep": 640, "choices": 9},
    "quick": {"shape": "11B", "rows": [32, 512, 4096], "scorings": 1, "keep": 640, "choices": 3},
    "tiny": {"shape": "tiny", "rows": [8, 16], "scorings": 2, "keep": 20, "choices": 2},
}
POLICIES = ("union", "contribution", "mmr", "dpp")


def run(shape: str, rows: list[int], scorings: int, keep: int, choices: int) -> Iterator[dict[str, Any]]:
    """Measure scoring in processes of their own, and then choosing. All of it on one core, batch 1, float32.

    Args:
        shape: name of the shape of the first cross-attention layer.
        rows: T, the lengths of the text.
        scorings: measured runs of each length.
        keep: features chosen by each policy.
        choices: measured runs of each policy.

    Yields:
        For each length the time, and two peaks of memory in MiB above inputs and result, None where the system is
        not Linux: `peak_mib` is what is needed at once, `resident_mib` has also what the allocator has not yet given
        back. Then for each policy the CPU time of choosing.

    Raises:
        CrosstrimError: a process that measures fails.
    """
    for count in rows:
        timed = _apart(shape, count, scorings)
        # With a fixed threshold glibc maps all but small tensors on their own and returns them at once. It is slow.
        needed = _apart(shape, count, 0, MALLOC_MMAP_THRESHOLD_=str(2**16))["resident_mib"]
        yield {"what": "score", "shape": shape, "rows": count, **timed, "peak_mib": needed}
    sizes = shapes.SHAPES[shape]
    evidence = _evidence(sizes, keep)
    turns = alternate(
        {name: partial(_choose, policies.voter(name), evidence, keep) for name in POLICIES}, rounds=choices
    )
    for name in POLICIES:
        common = {"what": "choose", "shape": shape, "policy": name, "kept": keep, "of": sizes.features_per_image}
        yield common | Timing.of(turns[name]).to_dict()


def _evidence(shape: shapes.Shape, keep: int) -> policies.Evidence:
    generator = torch.Generator().manual_seed(0)
    count, size = shape.features_per_image, shape.head_size
    logits = 3 * torch.randn(1, shape.query_heads, count, generator=generator)  # some heads agree, none is sure
    keys, values = (torch.randn(1, shape.key_value_heads, count, size, generator=generator) for _ in range(2))
    return policies.Evidence(
        saliency=256 * logits.softmax(-1),
        visible=torch.ones(1, count, dtype=torch.bool),
        keys=keys,
        values=values,
        budget=torch.tensor([[keep]]),
        features_per_image=count,
        features_per_tile=shape.features_per_tile,
    )


def _choose(policy: policies.Policy, evidence: policies.Evidence, keep: int) -> float:
    """CPU seconds of one choice on one core."""
    return cpu_seconds(lambda: crosstrim.select(policy(evidence), evidence.visible, keep=keep))


def _apart(shape: str, rows: int, runs: int, **variables: str) -> dict[str, Any]:
    """`_score` in a process of its own, whose peak is that of nothing else."""
    command = [sys.executable, "-m", __name__, shape, str(rows), str(runs)]
    environment = {**os.environ, **variables}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        raise CrosstrimError(
            f"the process that scores {rows} rows ended with code {process.returncode}: "
            f"{(process.stderr.strip().splitlines() or ['it was killed'])[-1]}; give it more memory, or try --quick."
        )
    found: dict[str, Any] = json.loads(process.stdout)
    return found


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
    peak = None
    if sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # forget the peak so far
        before = _resident_mib("VmRSS")
        result = crosstrim.saliency(queries, keys, visible)
        peak = round(_resident_mib("VmHWM") - before - result.nbytes / 2**20, 1)
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        crosstrim.saliency(queries, keys, visible)
        seconds.append(time.perf_counter() - begun)
    timing = Timing.of(seconds).to_dict() if seconds else {}
    return timing | {"resident_mib": peak}


def _resident_mib(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


if __name__ == "__main__":
    _shape, _rows, _runs = sys.argv[1:]
    print(json.dumps(_score(shapes.SHAPES[_shape], int(_rows), int(_runs))))
