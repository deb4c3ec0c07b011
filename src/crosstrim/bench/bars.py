"""The bars: figures of the suites that must stay below a limit, and how each is read off the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosstrim.errors import ResultError

Rows = Sequence[Mapping[str, Any]]
Figure = Callable[[Rows], float]


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
    figure: Figure
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


def _step(
    trim: str, dtype: str = "float32", layer: str = "all", tiles: int | None = None, field: str = "ms"
) -> Figure:
    """Of a decoding step in the cross-attention layers, under crosstrim or, without a trim, untrimmed."""
    way = "crosstrim" if trim else "untrimmed"
    wanted = {"phase": "decode", "dtype": dtype, "layer": layer, "way": way, "trim": trim, "tiles": tiles}
    return lambda rows: only(rows, field, **wanted)


def _of_what_can_fall(trim: str) -> Figure:
    """What is left of a step's time, of that which one feature alone would save: no choice gets below its floor."""

    def figure(rows: Rows) -> float:
        whole, part, floor = (_step(one, "bfloat16")(rows) for one in ("", trim, "one feature"))
        return abs(part - floor) / max(whole - floor, 1e-6)

    return figure


def _followers_prompt(rows: Rows) -> float:
    return only(rows, "ratio", phase="prefill", layer="followers", way="crosstrim", trim="keep=0.5")


def _worst(ratio: Callable[[Mapping[str, Any]], float | None]) -> Figure:
    """The largest of what the rows give; rows that give nothing do not count."""

    def figure(rows: Rows) -> float:
        found = [value for value in map(ratio, rows) if value is not None]
        if not found:
            raise ResultError("no row has what a bar is read off; run the suite again, whole and on Linux.")
        return max(found)

    return figure


def _of_what_the_floor_predicts(row: Mapping[str, Any]) -> float | None:
    counts = row["phase"] == "step" and row["batch"] >= 16 and row["way"] == "crosstrim" and "int8" not in row["trim"]
    return row["ratio"] / row["by_floor"] if counts else None


def _slope(field: str, flat: bool) -> Figure:
    """The largest slope along what a cost must not depend on (`flat`), or of all others."""
    free = {("step", "rows", "time_slope"), ("step", "rows", "memory_slope"), ("choose", "rows", "memory_slope")}

    def slope(row: Mapping[str, Any]) -> float | None:
        counts = ((row["what"], row["along"], field) in free) == flat and row[field] is not None
        return max(0.0, row[field]) if counts else None

    return _worst(slope)


def _highest_resident(rows: Rows) -> float:
    scores = [row for row in rows if row["what"] == "score"]
    return max(only(scores, "resident_mib", rows=row["rows"]) for row in scores)


def _growth_of_the_peak(rows: Rows) -> float:
    """How far the peak of the longest text lies above that of the shortest one of 512 rows or more, as a ratio."""
    scores = [row for row in rows if row["what"] == "score"]
    lengths = sorted(row["rows"] for row in scores)
    from_here = next((one for one in lengths if one >= 512), lengths[0])
    return only(scores, "peak_mib", rows=lengths[-1]) / max(only(scores, "peak_mib", rows=from_here), 1e-3)


def _choice(policy: str, place: int = 0) -> Figure:
    """CPU time of choosing, at the smallest number of features or a larger one."""

    def figure(rows: Rows) -> float:
        kept = sorted({row["kept"] for row in rows if row["what"] == "choose"})
        return only(rows, "ms", what="choose", policy=policy, kept=kept[place])

    return figure


def _of_untrimmed(field: str) -> Figure:
    """On mini at batch 1, the worst trim's time, of the untrimmed one's."""

    def figure(rows: Rows) -> float:
        alone = [row for row in rows if row["batch"] == min(row["batch"] for row in rows)]
        whole = only(alone, field, way="untrimmed")
        return max(float(row[field]) / whole for row in alone if row["way"] == "crosstrim")

    return figure


def _of_plain(rows: Rows) -> float:
    """On mini at the largest batch, the trims' mean time for a whole answer, of the plainly trimmed model's."""
    many = [row for row in rows if row["batch"] == max(row["batch"] for row in rows)]
    spent = {
        way: sum(1 / float(row["prompts_per_s"]) for row in many if row["way"] == way)
        for way in ("crosstrim", "plain")
    }
    return spent["crosstrim"] / spent["plain"]


def _second_question(rows: Rows) -> float:
    session, floor = (only(rows, "ms", way=way, question="second") for way in ("session", "features given"))
    return session / floor


BARS = (
    Bar("layers", "KV bytes of all cross-attention layers, keep=0.5", 0.51, _step("keep=0.5", field="kv_ratio")),
    Bar(
        *("layers", "KV bytes, picture of one tile, lossless", 0.26),
        _step("lossless", tiles=1, field="kv_ratio"),
    ),
    Bar("layers", "what a step's time can fall by, left at keep=0.5, batch 4", 0.53, _of_what_can_fall("keep=0.5")),
    Bar("layers", "what a step's time can fall by, left at keep=0.25, batch 4", 0.28, _of_what_can_fall("keep=0.25")),
    Bar(
        *("layers", "crosstrim's own code per step, of the untrimmed time", 0.02),
        _step("keep=0.5", layer="hooks", field="ratio"),
    ),
    Bar("layers", "later layers at a prompt of 256 rows, keep=0.5", 0.58, _followers_prompt),
    Bar(
        *("stack", "a step's time, of what the floor predicts, batch 16 and more", 1.1),
        _worst(_of_what_the_floor_predicts),
    ),
    Bar(
        "saliency", "resident memory of scoring at its peak, above inputs and result", 128.0, _highest_resident, "MiB"
    ),
    Bar("saliency", "memory needed at once to score 4096 rows, of that for 512", 1.1, _growth_of_the_peak),
    *(
        Bar("saliency", f"CPU time of choosing 640 of 6404 features, {policy}", limit, _choice(policy), "ms")
        for policy, limit in (("union", 25.0), ("contribution", 25.0), ("mmr", 25.0), ("dpp", 150.0))
    ),
    Bar("saliency", "CPU time of choosing 3202 of them, contribution", 250.0, _choice("contribution", -1), "ms"),
    Bar(
        *("saliency", "first layer's prompt while it scores, of the untrimmed one", 1.1),
        _worst(lambda row: row["ratio"] if row["what"] == "lead" and row["way"] == "crosstrim" else None),
    ),
    Bar("growth", "time against images, rows and batch, as a power", 1.15, _slope("time_slope", flat=False)),
    Bar("growth", "time of a step against rows of text, as a power", 0.2, _slope("time_slope", flat=True)),
    Bar("growth", "memory against images, rows and batch, as a power", 1.1, _slope("memory_slope", flat=False)),
    Bar("growth", "memory of choosing and of a step against rows", 0.2, _slope("memory_slope", flat=True)),
    Bar(
        "merge",
        "merging 6404 features into 1601, of the later layers' projections that it saves",
        0.1,
        lambda rows: only(rows, "ratio", what="merge"),
    ),
    Bar("session", "second question's time to first token, of the features given untrimmed", 1.1, _second_question),
    Bar(
        "session",
        "entries into the vision tower for both questions",
        1.0,
        lambda rows: sum(
            only(rows, "vision_tower_entries", way="session", question=question) for question in ("first", "second")
        ),
    ),
    Bar("mini", "time per token at batch 1, of the untrimmed one", 1.03, _of_untrimmed("per_token_ms")),
    Bar("mini", "time to the first token at batch 1, of the untrimmed one", 1.05, _of_untrimmed("first_token_ms")),
    Bar("mini", "time for an answer at batch 16, of the plainly trimmed model's", 1.0, _of_plain),
)
"""Ratios are of medians inside one run, trimmed to untrimmed where nothing else is said."""
