"""A finished calibration as a page: risk against budget, with the bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crosstrim.data import pages
from crosstrim.data.pages import Result, Table
from crosstrim.wording import counted, percent

FIGURE = "risk.png"
LOST = {"answer": "changed answers", "wrong": "right answers that became wrong"}


_AGAIN = (
    " *again* is the share of answers that were made again untrimmed; *kept* then counts both attempts. *KV bytes* "
    "and *operations* are computed from the model's configuration, as shares of untrimmed answers, vision tower left "
    "out."
)


def write(result: Result, folder: Path) -> list[Path]:
    """Write report.md and its figure into a folder, which is made if there is none.

    Args:
        result: of `calibrate`.
        folder: where to; files of these names are replaced.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ResultError: a file cannot be written.
    """
    return pages.write(folder / "report.md", markdown(result), {FIGURE: lambda plot: draw(result, plot)})


def markdown(result: Result) -> str:
    """The page: what was run, what follows, the tables, the figure."""
    dataset, model, levels = result["dataset"], result["model"], result["calibration"]
    drawn = f"{dataset['questions']} of {levels['drawn_from']} of {dataset['name']}, drawn with seed {levels['seed']}"
    facts = {
        "model": f"{model['name']}, {model['dtype']}",
        "questions": drawn,
        "left out": f"{counted(len(dataset['left_out']), 'row')} that could not be asked",
        "answers": f"greedy, at most {counted(result['generation']['max_new_tokens'], 'token')}",
        "counted": LOST[levels["loss"]],
        **pages.software(result),
    }
    return pages.markdown("Risk against budget", facts, tables(result), [FIGURE], verdict(result))


def verdict(result: Result) -> str:
    """What was found, in a sentence or two."""
    levels = result["calibration"]
    claim = f"a risk of at most {percent(levels['risk'])} % with confidence {percent(levels['confidence'])} %"
    if result["chosen"] is None:
        return f"No budget is certified for {claim}: {result['refusal']}"
    least = "Of the rules certified" if "escalate" in levels else "The smallest budget certified"
    keeps = ", the one that keeps least is" if "escalate" in levels else " is"
    return f"{least} for {claim}{keeps} {result['chosen']['label']}."


def tables(result: Result) -> Iterator[Table]:
    """The curve over all questions, and of each kind where there are several."""
    levels = result["calibration"]
    confidence = percent(levels["confidence"])
    yield _table(
        "All questions",
        {row["label"]: (row, row) for row in result["curve"]},
        f"*lost* counts {LOST[levels['loss']]}. In brackets are exact intervals of the risk (Clopper and Pearson), "
        f"each of {confidence} %. *bound* is the risk that is not exceeded, with {confidence} %; a check marks what "
        f"is certified: the bound is at most {percent(levels['risk'])} % here and at every larger budget. A budget "
        "whose test was lost was asked no further, nor were the smaller ones; their intervals allow for what was not "
        "asked." + _AGAIN * ("escalate" in levels),
        marked=True,
    )
    kinds = list(result["curve"][0]["kinds"])
    for kind in kinds if len(kinds) > 1 else ():
        rows = {row["label"]: (row, row["kinds"][kind]) for row in result["curve"]}
        yield _table(kind, rows, "Of this kind alone. Nothing is promised of a kind: the promise is of all together.")


def _table(
    title: str, rows: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]], note: str, marked: bool = False
) -> Table:
    again = any("escalate" in row for row, _ in rows.values())
    costs = ("again", "KV bytes", "operations") if again else ()
    header = ("budget", "kept", "lost", "risk", "bound", *costs, *["certified"] * marked)
    lines = [
        (
            label,
            percent(cell.get("kept_fraction", row["kept_fraction"])),
            f"{cell['lost']} of {cell['asked']}",
            f"[{percent(cell['low'], 2)}, {percent(cell['high'], 2)}]",
            percent(cell["bound"], 2),
            *(_costs(cell) if again else ()),
            *["✓" if row["certified"] else ""] * marked,
        )
        for label, (row, cell) in rows.items()
    ]
    return Table(title, header, tuple(lines), note)


def _costs(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    if "cost" not in cell:  # nothing of it was asked
        return "", "", ""
    cost = cell["cost"]
    return percent(cell["escalated"] / cell["asked"]), percent(cost["kv_bytes"]), percent(cost["flops"])


def draw(result: Result, plot: Any) -> Any:
    """The figure: what was lost of what was asked, with intervals, and the risk that is allowed; in per cent.

    Args:
        result: of `calibrate`.
        plot: matplotlib.pyplot.

    Returns:
        A matplotlib figure.
    """
    levels, curve = result["calibration"], result["curve"]
    figure, grid = pages.canvas(plot, (5.6, 3.8))
    axes = grid[0, 0]
    kept = [100 * row["kept_fraction"] for row in curve]
    rates = [100 * row["lost"] / row["asked"] for row in curve]
    whole = [row["asked"] == row["questions"] for row in curve]
    ends = [[100 * row[end] for row in curve] for end in ("low", "high")]
    axes.vlines(kept, *ends, color="tab:blue", alpha=0.4, linewidth=1.4, label="exact interval")
    axes.plot(kept, [100 * row["bound"] for row in curve], "_", color="tab:blue", markersize=11, label="bound")
    for name, filled, face in (("measured", True, "tab:blue"), ("stopped early", False, "white")):
        points = [(x, y) for x, y, done in zip(kept, rates, whole, strict=True) if done == filled]
        if points:
            style = {**pages.POINTS, "linestyle": "", "color": "tab:blue", "markerfacecolor": face}
            axes.plot(*zip(*points, strict=True), label=name, **style)
    for x, y, row in zip(kept, rates, curve, strict=True):
        if result["chosen"] is not None and row["label"] == result["chosen"]["label"]:
            axes.plot([x], [y], "o", color="tab:green", markersize=10, fillstyle="none", label="chosen")
    pages.level(axes, 100 * levels["risk"], color="tab:red", label="risk allowed")
    # Intervals of what was stopped reach to the top and would squeeze the rest.
    most = max([3 * levels["risk"], *(row["high"] for row, done in zip(curve, whole, strict=True) if done)])
    axes.set_ylim(-2 * most, 105 * most)
    axes.set_xlim(left=0)
    axes.set_xlabel("kept image features (% of the visible ones)")
    axes.set_ylabel(f"{LOST[levels['loss']]} (%)")
    axes.grid(**pages.GRID)
    pages.legend(axes, "upper right")
    return figure
