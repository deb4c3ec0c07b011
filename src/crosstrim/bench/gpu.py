"""Suite "gpu": random models of real shapes on a GPU, in bfloat16: prompt, time per token, memory, largest batch."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from crosstrim.bench import kernels, layers, shapes
from crosstrim.bench.kernels import FITS, NOT_REACHED
from crosstrim.bench.timing import Timing, alternate, now
from crosstrim.errors import DeviceError
from crosstrim.models import compat, mllama
from crosstrim.models.names import cache_keyword

Row = dict[str, Any]

_11B: dict[str, Any] = {"shape": "11B", "self_layers": 32, "cross_layers": 8, "vocabulary": 128256}
_90B: dict[str, Any] = {"shape": "90B", "self_layers": 16, "cross_layers": 4, "vocabulary": 128256}
_TINY: dict[str, Any] = {"shape": "tiny", "self_layers": 1, "cross_layers": 3, "vocabulary": 64}

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {
        "device": "cuda",
        "budget_s": 360,
        "rows": 64,
        "steps": 16,
        "rounds": 2,
        "scored": [64, 2048],
        "kept": [640, 3202],
        "pictures": [1, 8],
        "cases": [
            {**_11B, "tiles": [4, 1], "batches": [1, 8, 32, 64, 128], "larger": [192, 256, 384, 512, 768]},
            {**_90B, "tiles": [4], "batches": [8, 32], "larger": []},
        ],
    },
    "quick": {
        "device": "cuda",
        "budget_s": 120,
        "rows": 64,
        "steps": 8,
        "rounds": 1,
        "scored": [64],
        "kept": [640],
        "pictures": [1],
        "cases": [{**_11B, "tiles": [4], "batches": [8, 64], "larger": []}],
    },
    "tiny": {
        "device": "cpu",
        "budget_s": 60,
        "rows": 8,
        "steps": 3,
        "rounds": 1,
        "scored": [8],
        "kept": [20],
        "pictures": [1],
        "cases": [{**_TINY, "tiles": [4, 1], "batches": [1, 2], "larger": [4]}],
    },
}
COLUMNS = (
    *("what", "shape", "tiles", "batch", "way", "trim", "status", "ms_per_image", "prompt_ms", "step_ms"),
    *("step_busy_ms", "tokens_per_s", "prompt_peak_gib", "step_peak_gib", "kv_gib", "next_batch"),
)
TRIMS: dict[str, dict[str, Any]] = {"lossless": {}, "keep=0.5": {"keep": 0.5}, "keep=0.25": {"keep": 0.25}}
# Which features stay does not matter to memory, and the union chooses the quickest.
QUICKLY = {name: options | ({"policy": "union"} if options else {}) for name, options in TRIMS.items()}

TOO_LARGE = "does not fit"


def run(
    device: str,
    budget_s: float,
    rows: int,
    steps: int,
    rounds: int,
    scored: list[int],
    kept: list[int],
    pictures: list[int],
    cases: list[dict[str, Any]],
) -> Iterator[Row]:
    """Measure the kernels, the vision tower, and then each model at each number of tiles and batch size.

    Cross-attention layers come last in these models; at which depth they stand changes no time. The features are
    given, so the vision tower has rows of its own.

    Args:
        device: to run on.
        budget_s: seconds after which nothing new is begun; what is left is reported as not reached.
        rows: T of the prompt.
        steps: measured decoding steps of each run.
        rounds: measured runs of each variant.
        scored: T of the texts by which a picture is scored.
        kept: how many of a picture's features are chosen greedily.
        pictures: batch sizes of the vision tower.
        cases: of each model its shape, self_layers, cross_layers and vocabulary, the tiles and batches to run, and
            larger batches to try until one does not fit.

    Yields:
        Rows of some kinds (`what`): "score" and "choose" as of `kernels.run`, "vision tower", "generate", "largest
        batch". `step_busy_ms` is the time that the GPU itself works in a step, without waiting for the host; None
        where it cannot be seen.

    Raises:
        DeviceError: there is no such device.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "the suite gpu needs a CUDA device, and torch sees none; run it on a machine with an NVIDIA GPU and a "
            "CUDA build of torch, or measure on the CPU with the suites layers and decode."
        )
    deadline = time.monotonic() + budget_s
    first = shapes.SHAPES[cases[0]["shape"]]
    yield from kernels.run(first, device, scored, kept, rounds + 1, deadline)
    for batch in pictures:
        yield _tower(first, batch, device, rounds, deadline)
    for case in cases:
        yield from _model(**case, device=device, rows=rows, steps=steps, rounds=rounds, deadline=deadline)
        _free(device)


@torch.no_grad()
def _tower(shape: shapes.Shape, batch: int, device: str, rounds: int, deadline: float) -> Row:
    row = {"what": "vision tower", "shape": shape.name, "tiles": shape.tiles_per_image, "batch": batch}
    if time.monotonic() > deadline:
        return row | {"status": NOT_REACHED}

    def encode() -> Callable[[], float]:
        tower = shapes.vision_tower(shape, dtype=torch.bfloat16, device=device)
        inputs = shapes.pictures(shape, batch, dtype=torch.bfloat16, device=device)

        def seconds() -> float:
            begun = now(torch.device(device))
            tower(**inputs)
            return now(torch.device(device)) - begun

        return seconds

    seconds = _unless_too_large(lambda: alternate({"tower": encode()}, rounds=rounds)["tower"], device)
    if seconds is None:
        return row | {"status": TOO_LARGE}
    return row | {"status": FITS, "ms_per_image": round(Timing.of(seconds).median / batch * 1e3, 3)}


@torch.no_grad()
def _model(
    shape: str,
    self_layers: int,
    cross_layers: int,
    vocabulary: int,
    tiles: list[int],
    batches: list[int],
    larger: list[int],
    device: str,
    rows: int,
    steps: int,
    rounds: int,
    deadline: float,
) -> Iterator[Row]:
    sizes = shapes.SHAPES[shape]
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    depth: dict[str, Any] = {"self_layers": self_layers, "cross_layers": cross_layers}
    common = {"shape": shape, **depth, "rows": rows, "dtype": "bfloat16", "device": device}
    model = _unless_too_large(lambda: shapes.build(sizes, **depth, vocabulary=vocabulary, **like), device)
    if model is None:
        yield {"what": "generate", **common, "status": TOO_LARGE}
        return
    compat.apply(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    yield {"what": "weights", **common, "status": FITS, "weights_gib": _gib(weights)}

    def prompt(batch: int, real: int) -> dict[str, Any]:
        # Logits of the last row alone, as generate does.
        return {**shapes.prompt(sizes, batch=batch, rows=rows, tiles=real, **like), "logits_to_keep": 1}

    for real, batch in itertools.product(tiles, batches):
        cell = {"what": "generate", **common, "tiles": real, "batch": batch}
        if time.monotonic() > deadline:
            yield cell | {"status": NOT_REACHED}
            continue
        ways = layers.make_ways(model, prompt(1, real), TRIMS)
        inputs = _unless_too_large(partial(prompt, batch, real), device)
        if inputs is None:
            yield cell | {"status": TOO_LARGE}
            continue
        runs = {name: partial(_generate, model, way, inputs, steps) for name, way in ways.items()}
        safe = {name: partial(_unless_too_large, one, device) for name, one in runs.items()}
        turns = alternate(safe, rounds=rounds, warm_up=1)
        for way, trim in ways:
            yield cell | {"way": way, "trim": trim} | _summary(turns[way, trim], batch)
        del runs, safe, turns, inputs
        _free(device)
    if larger:
        for real in tiles:
            ways = layers.make_ways(model, prompt(1, real), QUICKLY, plain=False)
            for (way, trim), put_on in ways.items():
                attempt = partial(_prompt_and_step, model, put_on, partial(prompt, real=real))
                row = {"what": "largest batch", **common, "tiles": real, "way": way, "trim": trim}
                yield row | _largest(attempt, [*batches, *larger], device, deadline)


def _generate(model: nn.Module, way: layers.Way, inputs: dict[str, Any], steps: int) -> dict[str, Any]:
    """One prompt and some decoding steps: seconds, bytes at the peak, bytes of the image features' cache."""
    device = next(model.parameters()).device
    with torch.no_grad(), way():
        _forget_peak(device)
        begun = now(device)
        cache = layers.new_cache(model)
        model(**inputs, **{cache_keyword(): cache})
        prompt = now(device) - begun
        prompt_peak = _peak(device)
        _forget_peak(device)
        arguments, seconds = layers.step(inputs, cache), []
        for _ in range(steps + 1):
            begun = now(device)
            model(**arguments())
            seconds.append(now(device) - begun)
        step_peak = _peak(device)
        busy = _busy_seconds(lambda: model(**arguments()), device)
    return {
        "prompt": prompt,
        "steps": seconds[1:],  # the first one makes what the others reuse
        "busy": busy,
        "prompt_peak": prompt_peak,
        "step_peak": step_peak,
        "kv": layers.held_bytes(cache, mllama.locate(model).layer_indices),
    }


def _summary(turns: list[dict[str, Any] | None], batch: int) -> Row:
    found = [one for one in turns if one is not None]
    if len(found) < len(turns):
        return {"status": TOO_LARGE}
    step = Timing.of([seconds for one in found for seconds in one["steps"]])
    busy = [one["busy"] for one in found if one["busy"] is not None]
    return {
        "status": FITS,
        "prompt_ms": round(Timing.of([one["prompt"] for one in found]).median * 1e3, 3),
        **{f"step_{name}": value for name, value in step.to_dict().items()},
        "step_busy_ms": round(Timing.of(busy).median * 1e3, 3) if busy else None,
        "tokens_per_s": round(batch / step.median, 1),
        "prompt_peak_gib": _gib(found[0]["prompt_peak"]),
        "step_peak_gib": _gib(found[0]["step_peak"]),
        "kv_gib": _gib(found[0]["kv"]),
    }


def _prompt_and_step(
    model: nn.Module, way: layers.Way, prompt: Callable[[int], dict[str, Any]], batch: int
) -> dict[str, Any]:
    return _generate(model, way, prompt(batch), 1)


def _largest(attempt: Callable[[int], Any], batches: list[int], device: str, deadline: float) -> Row:
    """The largest batch that ran, and the next one, which did not fit or was not reached."""
    fitting = 0
    for batch in batches:
        if time.monotonic() > deadline:
            return {"status": NOT_REACHED, "batch": fitting, "next_batch": batch}
        if _unless_too_large(partial(attempt, batch), device) is None:
            return {"status": TOO_LARGE, "batch": fitting, "next_batch": batch}
        _free(device)
        fitting = batch
    return {"status": FITS, "batch": fitting, "next_batch": None}


def _unless_too_large(attempt: Callable[[], Any], device: str) -> Any:
    """What the attempt returns; None when the device has not the memory, which is free again then."""
    try:
        return attempt()
    except torch.OutOfMemoryError:
        pass  # the error holds what was allocated until this block ends
    _free(device)
    return None


def _free(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _gib(count: int | None) -> float | None:
    return None if count is None else round(count / 2**30, 3)


def _busy_seconds(attempt: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds that kernels ran on the GPU; None without one, or where the profiler sees none."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        attempt()
        torch.cuda.synchronize(device)
    events = [event for event in seen.key_averages() if event.device_type.name == "CUDA"]
    microseconds = sum(event.self_device_time_total for event in events if not event.is_user_annotation)
    return microseconds / 1e6 or None
