"""Suite "mini": the embedded model end to end, pictures and generation included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import crosstrim
from crosstrim import mini
from crosstrim.asking import answering, images
from crosstrim.bench.layers import Way, make_ways
from crosstrim.bench.timing import Timing, alternate

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"batches": [1, 16], "tokens": 16, "rounds": 9},
    "quick": {"batches": [1, 8], "tokens": 8, "rounds": 3},
    "tiny": {"batches": [2], "tokens": 3, "rounds": 1},
}
TRIMS: dict[str, dict[str, Any]] = {"keep=0.5": {"keep": 0.5}, "keep=0.25": {"keep": 0.25}, "lossless": {}}


def run(batches: list[int], tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure greedy generation on the first held-out questions.

    Args:
        batches: batch sizes.
        tokens: generated for every prompt, whatever it says.
        rounds: measured generations of each variant.

    Yields:
        One row for each batch size, way and trim: prompts a second, time to the first token (vision tower and prompt
        of the whole batch), and time per token after it.
    """
    model, processor = crosstrim.load("mini")
    for batch in batches:
        asked = mini.heldout()[:batch]
        pictures = [images.open_image(one["image"]) for one in asked]
        inputs = answering.encode(processor, pictures, [one["question"] for one in asked]).to(model.device)
        with torch.no_grad():
            ways = make_ways(model, inputs, TRIMS)
        turns = alternate(
            {name: partial(_generate, model, way, inputs, tokens) for name, way in ways.items()}, rounds=rounds
        )
        for way, trim in ways:
            first, rest = (Timing.of(list(one)) for one in zip(*turns[way, trim], strict=True))
            yield {
                "model": "mini",
                "batch": batch,
                "way": way,
                "trim": trim,
                "prompts_per_s": round(batch / (first.median + rest.median), 2),
                **_named("first_token", first),
                **_named("per_token", Timing.of([seconds / (tokens - 1) for _, seconds in turns[way, trim]])),
                "runs": rounds,
            }


def _named(what: str, timing: Timing) -> dict[str, float]:
    return {name.replace("ms", f"{what}_ms", 1): value for name, value in timing.to_dict().items() if name != "runs"}


def _generate(model: Any, way: Way, inputs: Any, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    from transformers import LogitsProcessorList

    times: list[float] = []

    def watch(_tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        times.append(time.perf_counter())
        return scores

    begun = time.perf_counter()
    with way():
        model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([watch]),
        )
    return times[0] - begun, times[-1] - times[0]
