"""The suites by name, and one run of one of them as a result that can be written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from crosstrim.bench import bars, decode, gpu, growth, layers, machine, merging, mini, saliency, session, stack
from crosstrim.trimming.report import versions

FORMAT = "crosstrim-bench/1"

Row = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """What can be measured.

    Attributes:
        name: on the command line.
        what: it measures, in a sentence for people.
        run: yields rows as they are measured, from the settings of one size.
        settings: arguments of `run` by size: "full", "quick" and, for tests, "tiny".
        columns: the fields that people read, in order.
        across: the field along a figure's x axis; categories where it is no number.
        up: the field along its y axis.
        lines: the fields that tell one line, or one kind of bar, from another.
        only: values of fields that the figure is confined to.
        powers: whether both axes are logarithmic, so that a power is a straight line.
    """

    name: str
    what: str
    run: Callable[..., Iterator[Row]]
    settings: dict[str, dict[str, Any]]
    columns: tuple[str, ...]
    across: str
    up: str
    lines: tuple[str, ...]
    only: tuple[tuple[str, Any], ...] = ()
    powers: bool = False


_TIME = ("ms", "ms_p20", "ms_p80")

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "layers",
            "time and KV bytes of a first and two later cross-attention layers of the 11B model",
            layers.run,
            layers.SETTINGS,
            ("phase", "dtype", "batch", "tiles", "layer", "way", "trim", *_TIME, "ratio", "kv_ratio"),
            across="trim",
            up="ratio",
            lines=("dtype", "phase", "layer", "tiles"),
            only=(("way", "crosstrim"),),
        ),
        Suite(
            "decode",
            "time of a decoding step in those layers, and bytes, against what is kept and the batch size",
            decode.run,
            decode.SETTINGS,
            ("batch", "way", "kept", *_TIME, "ratio", "kv_bytes"),
            across="kept",
            up="ratio",
            lines=("way", "batch"),
        ),
        Suite(
            "stack",
            "a whole period of the 11B decoder, prompt and step, beside what bytes and operations predict",
            stack.run,
            stack.SETTINGS,
            (
                *("dtype", "phase", "tiles", "rows", "batch", "way", "trim", "ms", "ratio", "by_bytes"),
                *("by_operations", "by_floor", "tokens_per_s", "kv_gb", "tokens_per_s_per_gb"),
            ),
            across="batch",
            up="ratio",
            lines=("tiles", "trim"),
            only=(("dtype", "float32"), ("phase", "step"), ("rows", 64), ("way", "crosstrim")),
        ),
        Suite(
            "saliency",
            "time and peak memory of scoring, CPU time of choosing, and both in the first layer's prompt",
            saliency.run,
            saliency.SETTINGS,
            ("what", "dtype", "rows", "policy", "kept", "way", *_TIME, "ratio", "peak_mib", "resident_mib"),
            across="rows",
            up="peak_mib",
            lines=("what",),
            only=(("what", "score"),),
        ),
        Suite(
            "growth",
            "how time and memory of choosing, of a prompt and of a step grow with images, rows and the batch",
            growth.run,
            growth.SETTINGS,
            ("what", "along", "value", *_TIME, "peak_mib", "time_slope", "memory_slope"),
            across="value",
            up="ms",
            lines=("what", "along"),
            powers=True,
        ),
        Suite(
            "merge",
            "CPU time of merging dropped features, against the projections that dropping them saves",
            merging.run,
            merging.SETTINGS,
            ("what", "kept", "of", "layers", *_TIME, "ratio"),
            across="what",
            up="ms",
            lines=("shape",),
        ),
        Suite(
            "session",
            "the first and the second question about a picture on mini, anew and in a session: file to first token",
            session.run,
            session.SETTINGS,
            ("way", "question", *_TIME, "ratio", "vision_tower_entries"),
            across="question",
            up="ms",
            lines=("way",),
        ),
        Suite(
            "mini",
            "mini end to end: prompts a second, time to the first token, time per token",
            mini.run,
            mini.SETTINGS,
            ("batch", "way", "trim", "prompts_per_s", "first_token_ms", "per_token_ms"),
            across="trim",
            up="per_token_ms",
            lines=("way", "batch"),
        ),
        Suite(
            "gpu",
            "random models of 11B's and 90B's shapes on a GPU: prompt, time per token, memory, largest batch",
            gpu.run,
            gpu.SETTINGS,
            gpu.COLUMNS,
            across="batch",
            up="step_ms",
            lines=("shape", "tiles", "way", "trim"),
            only=(("what", "generate"),),
        ),
    )
}


def measure(
    suite: Suite, size: str = "full", progress: Callable[[Result], None] = lambda result: None, **changes: Any
) -> Result:
    """Run a suite.

    Args:
        suite: one of `SUITES`.
        size: of its settings.
        progress: called with the result so far whenever there is a row more; it says `complete: false`.
        **changes: to the settings.

    Returns:
        Plain JSON types: format, suite, size, config, rows, bars, complete, versions, hardware.

    Raises:
        CrosstrimError: of the suite.
    """
    settings = suite.settings[size] | changes
    rows: list[Row] = []
    result = {
        "format": FORMAT,
        "suite": suite.name,
        "size": size,
        "config": settings,
        "rows": rows,
        "bars": [],
        "complete": False,
        "versions": versions(settings.get("device", "cpu")),
        "hardware": machine.describe(),
    }
    with torch.random.fork_rng(devices=[]):
        for row in suite.run(**settings):
            rows.append(row)
            progress(result)
    return result | {"bars": bars.judge(suite.name, rows), "complete": True}
