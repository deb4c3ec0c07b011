"""The bars: figures of the suites that must stay below a limit, and how each is read off the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosstrim.errors import ResultError

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Bar:
    """What one figure of a suite must not exceed.

    Attributes:
        suite: whose rows the figure is read off.
        name: what is measured, in words.
        limit: the highest value that meets the bar.
        figure: reads the value off the suite's rows.
        unit: of the value; empty for a ratio.
    """

    suite: str
    name: str
    limit: float
    figure: Callable[[Rows], float]
    unit: str = ""


def of(suite: str) -> list[Bar]:
    """The bars that belong to a suite."""
    return [bar for bar in BARS if bar.suite == suite]


def judge(suite: str, rows: Rows) -> list[dict[str, Any]]:
    """Hold a suite's rows against its bars.

    Returns:
        For each bar its name, figure, limit, unit, and whether it is met.

    Raises:
        ResultError: the rows lack what a bar is read off.
    """
    judged = []
    for bar in of(suite):
        figure = bar.figure(rows)
        judged.append(
            {"name": bar.name, "figure": figure, "limit": bar.limit, "unit": bar.unit, "met": figure <= bar.limit}
        )
    return judged


def only(rows: Iterable[Mapping[str, Any]], field: str, /, **wanted: Any) -> float:
    """The field of the one row that has these values.

    Raises:
        ResultError: there is no such row, there are several, or the field was not measured.
    """
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    if len(found) != 1 or found[0].get(field) is None:
        which = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
        raise ResultError(
            f"{len(found)} rows have {which}, where a bar reads {field!r} off exactly one that measured it; "
            "run the suite again, whole and on Linux."
        )
    return float(found[0][field])


def _step(trim: str, layer: str = "all", field: str = "ratio", tiles: int | None = None) -> Callable[[Rows], float]:
    """Of a decoding step under crosstrim in float32."""
    wanted = {"phase": "decode", "dtype": "float32", "layer": layer, "way": "crosstrim", "trim": trim, "tiles": tiles}
    return lambda rows: only(rows, field, **wanted)


def _prompt(layer: str) -> Callable[[Rows], float]:
    """Of the prompt under crosstrim at keep=0.5."""
    return lambda rows: only(rows, "ratio", phase="prefill", layer=layer, way="crosstrim", trim="keep=0.5")


def _highest_resident(rows: Rows) -> float:
    scores = [row for row in rows if row["what"] == "score"]
    return max(only(scores, "resident_mib", rows=row["rows"]) for row in scores)


def _growth_of_the_peak(rows: Rows) -> float:
    """How far the peak of the longest text lies above that of the shortest one of 512 rows or more, as a ratio."""
    lengths = sorted(row["rows"] for row in rows if row["what"] == "score")
    from_here = next((one for one in lengths if one >= 512), lengths[0])
    return only(rows, "peak_mib", rows=lengths[-1]) / max(only(rows, "peak_mib", rows=from_here), 1e-3)


def _choice(policy: str) -> Callable[[Rows], float]:
    return lambda rows: only(rows, "ms", what="choose", policy=policy)


BARS = (
    Bar("layers", "KV bytes of all cross-attention layers, keep=0.5", 0.51, _step("keep=0.5", field="kv_ratio")),
    Bar("layers", "KV bytes, picture of one tile, lossless", 0.26, _step("lossless", field="kv_ratio", tiles=1)),
    Bar("layers", "time in the cross-attention layers per step, batch 4, keep=0.5", 0.58, _step("keep=0.5")),
    Bar("layers", "time in the cross-attention layers per step, batch 4, keep=0.25", 0.33, _step("keep=0.25")),
    Bar("layers", "crosstrim's own code per step, of the untrimmed time", 0.02, _step("keep=0.5", layer="hooks")),
    Bar("layers", "first layer at a prompt of 256 rows, which scores", 1.6, _prompt("leader")),
    Bar("layers", "later layers at a prompt of 256 rows, keep=0.5", 0.58, _prompt("followers")),
    Bar(
        "saliency", "resident memory of scoring at its peak, above inputs and result", 128.0, _highest_resident, "MiB"
    ),
    Bar("saliency", "memory needed at once to score 4096 rows, of that for 512", 1.1, _growth_of_the_peak),
    *(
        Bar("saliency", f"CPU time of choosing 640 of 6404 features, {policy}", 150.0, _choice(policy), "ms")
        for policy in ("union", "contribution", "mmr", "dpp")
    ),
    Bar(
        "merge",
        "merging 6404 features into 1601, of the later layers' projections that it saves",
        0.1,
        lambda rows: only(rows, "ratio", what="merge"),
    ),
    Bar(
        "session",
        "second question's time to first token, of the first one's",
        0.25,
        lambda rows: only(rows, "ratio", way="session", question="second"),
    ),
    Bar(
        "session",
        "entries into the vision tower for both questions",
        1.0,
        lambda rows: sum(
            only(rows, "vision_tower_entries", way="session", question=question) for question in ("first", "second")
        ),
    ),
)
"""Ratios are of medians inside one run, trimmed to untrimmed where nothing else is said."""
