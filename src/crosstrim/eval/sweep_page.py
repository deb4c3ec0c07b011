"""A finished result as a page of tables and as figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crosstrim.data import pages
from crosstrim.data.pages import Result, Table
from crosstrim.eval.metrics import RESAMPLES
from crosstrim.eval.settings import LOSSLESS, ORACLE, UNTRIMMED
from crosstrim.wording import counted, percent, rounded

Row = Mapping[str, Any]

FIGURES = {"accuracy": "accuracy", "unchanged": "answers unchanged by trimming"}
"""What is drawn against the kept fraction, each into a file of that name."""

_MARKERS = "osD^vP*X<>"


def write(result: Result, folder: Path) -> list[Path]:
    """Write report.md and its figures into a folder, which is made if there is none.

    Args:
        result: of `sweep.run` or `sweep.read`.
        folder: where to; files of these names are replaced.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ResultError: a file cannot be written.
    """
    figures = {f"{metric}.png": partial(draw, result, metric, name) for metric, name in FIGURES.items()}
    return pages.write(folder / "report.md", markdown(result), figures)


def markdown(result: Result) -> str:
    """The page: what was run, a table over all questions with the Pareto front, one table per kind, the figures."""
    dataset, model = result["dataset"], result["model"]
    layers = counted(model["cross_attention_layers"], "cross-attention layer")
    facts = {
        "model": f"{model['name']}, {model['dtype']}, {layers}",
        "questions": f"{dataset['questions']} of {dataset['name']}",
        "left out": f"{counted(len(dataset['left_out']), 'row')} that could not be asked",
        "answers": f"greedy, at most {counted(result['generation']['max_new_tokens'], 'token')}",
        **pages.software(result),
    }
    intro = (
        f"In brackets are 95 % bootstrap bands over questions ({RESAMPLES} resamples, the same for all settings). "
        "*kept* is a share of the visible features, *cache* the share of their keys and values that all "
        "cross-attention layers hold together once the prompt is read. *unchanged* counts answers equal to the "
        "untrimmed model's. *KL* is the divergence of the first token's distribution from the untrimmed model's, in "
        "nats."
    )
    figures = [f"{metric}.png" for metric in FIGURES]
    return pages.markdown("Accuracy against kept image features", facts, tables(result), figures, intro)


def tables(result: Result) -> Iterator[Table]:
    """All questions, and each kind where there are several."""
    yield _table(
        "All questions",
        result["summary"],
        lambda row: row["overall"],
        "A check marks the Pareto front: no other setting is at least as accurate with no more cache, and better in "
        "one of the two. The oracle and the untrimmed model do not compete.",
        mark_front=True,
    )
    kinds = result["summary"][0]["kinds"]
    for kind, cell in kinds.items() if len(kinds) > 1 else ():
        note = f"{counted(cell['questions'], 'question')}."
        yield _table(kind, result["summary"], lambda row, kind=kind: row["kinds"][kind], note)  # type: ignore[misc]


def _table(
    title: str, rows: Sequence[Row], cell_of: Callable[[Row], Row], note: str, mark_front: bool = False
) -> Table:
    header = ["setting", "kept", "cache", "accuracy", "against untrimmed", "unchanged", "KL"]
    lines = []
    for row in rows:
        cell = cell_of(row)
        seeds = f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
        cells = [
            row["group"] + seeds,
            percent(cell["kept_fraction"]),
            percent(cell["cache_fraction"]),
            _banded(cell["accuracy"]),
            _banded(cell["accuracy_change"], sign="+"),
            _banded(cell["unchanged"]),
            rounded(cell["kl"], 2),
        ]
        lines.append((*cells, *["✓" if row["pareto"] else ""] * mark_front))
    return Table(title, (*header, *["Pareto"] * mark_front), tuple(lines), note)


def _banded(estimate: Mapping[str, float], sign: str = "") -> str:
    mean, low, high = (100 * estimate[name] for name in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def draw(result: Result, metric: str, name: str, plot: Any) -> Any:
    """A figure with a panel for all questions and one per kind: a metric against the kept fraction, in per cent.

    Args:
        result: of `sweep.run` or `sweep.read`.
        metric: "accuracy" or "unchanged".
        name: what to call it.
        plot: matplotlib.pyplot.

    Returns:
        A matplotlib figure.
    """
    rows = result["summary"]
    kinds = list(rows[0]["kinds"])
    panels: dict[str, Callable[[Row], Row]] = {"all questions": lambda row: row["overall"]}
    if len(kinds) > 1:
        panels |= {kind: lambda row, kind=kind: row["kinds"][kind] for kind in kinds}
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    size = (4.2 * across, 3.4 * down + 0.9)
    figure, grid = pages.canvas(plot, size, down, across, sharex=True, sharey=True)
    styles = _styles(rows, plot)
    kept = [cell_of(row)["kept_fraction"] for cell_of in panels.values() for row in rows if row["curve"] in styles]
    grid[0, 0].set_xlim(0, min(100, 100 * max(kept, default=1) + 5))
    for axes, (title, cell_of) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(f"{title} ({cell_of(rows[0])['questions']})")
        _draw_panel(axes, rows, cell_of, metric, styles)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("kept image features (% of the visible ones)")
    figure.supylabel(f"{name} (%)")
    lines, curves = grid.flat[0].get_legend_handles_labels()
    entries = _legend(lines, curves, plot)
    columns = min(5, 2 * across, len(entries))  # one panel is too narrow for more
    pages.legend(figure, "outside upper center", handles=entries, ncols=columns)
    return figure


def _legend(lines: Sequence[Any], curves: Sequence[str], plot: Any) -> list[Any]:
    """One entry per policy, and one for what dashes and dots mean."""
    entries = {curve.partition(",")[0]: line for line, curve in reversed(list(zip(lines, curves, strict=True)))}
    for policy, line in entries.items():
        line.set_label(policy)
    meanings = {"--": "dashed: first layer's cache left whole", ":": "dotted: cache in eight bits"}
    used = {line.get_linestyle() for line, curve in zip(lines, curves, strict=True) if "," in curve}
    shown = [
        plot.Line2D([], [], color="0.4", linestyle=style, label=meaning)
        for style, meaning in meanings.items()
        if style in used
    ]
    return list(reversed(entries.values())) + shown


def _draw_panel(
    axes: Any, rows: Sequence[Row], cell_of: Callable[[Row], Row], metric: str, styles: Mapping[str, Any]
) -> None:
    """Lines with shaded bands, and one point alone with a bar.

    The untrimmed model is a level line, and the lossless trim would be a point on it.
    """
    reference = cell_of(rows[0])[metric]
    if metric != "unchanged":
        pages.level(axes, 100 * reference["mean"], color="0.4", label=UNTRIMMED)
        axes.axhspan(100 * reference["low"], 100 * reference["high"], color="0.4", alpha=0.12, linewidth=0)
    for curve, style in styles.items():
        cells = sorted((cell_of(row) for row in rows if row["curve"] == curve), key=lambda one: one["kept_fraction"])
        kept = [100 * cell["kept_fraction"] for cell in cells]
        mean, low, high = ([100 * cell[metric][name] for cell in cells] for name in ("mean", "low", "high"))
        axes.plot(kept, mean, label=curve, **{**pages.POINTS, **style})
        axes.fill_between(kept, low, high, color=style["color"], alpha=0.13, linewidth=0)
        if len(kept) == 1:  # a band has no width there
            axes.vlines(kept, low, high, color=style["color"], alpha=0.5, linewidth=1.4)
    axes.grid(**pages.GRID)


def _styles(rows: Sequence[Row], plot: Any) -> dict[str, dict[str, Any]]:
    """Colour and marker say the policy; the line, that the first layer's cache stays whole or is in eight bits."""
    trims = [row for row in rows if row["curve"].partition(",")[0] not in (UNTRIMMED, LOSSLESS)]
    curves = {row["curve"]: row["trim_first_layer"] for row in trims}
    policies = list(dict.fromkeys(curve.partition(",")[0] for curve in curves))
    colours = plot.get_cmap("tab10").colors
    styles = {}
    for curve, trims_first_layer in curves.items():
        policy = curve.partition(",")[0]
        place = policies.index(policy)
        styles[curve] = {
            "color": "black" if policy == ORACLE else colours[place % len(colours)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": ":" if curve.endswith(" cache") else "-" if trims_first_layer else "--",
        }
    return styles
