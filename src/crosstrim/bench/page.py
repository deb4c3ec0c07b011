"""A suite's result as tables, as files and as a figure."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from crosstrim.bench.suites import SUITES, Suite
from crosstrim.data import pages
from crosstrim.data.pages import Result, Table
from crosstrim.errors import ResultError
from crosstrim.files import write_json, written_whole
from crosstrim.wording import counted, rounded

BARS = "bars"
"""The title of the table of bars."""


def tables(result: Result) -> Iterator[Table]:
    """The rows for people, and the bars where the suite has any."""
    suite = SUITES[result["suite"]]
    shown = [name for name in suite.columns if any(row.get(name) is not None for row in result["rows"])]
    cells = tuple(tuple(_cell(row.get(name)) for name in shown) for row in result["rows"])
    yield Table(suite.name, tuple(shown), cells, f"{suite.what[0].upper()}{suite.what[1:]}.")
    if result["bars"]:
        yield bars_table(result)


def bars_table(result: Result) -> Table:
    """Each bar with its figure."""
    rows = tuple(
        (
            bar["name"],
            f"{rounded(bar['figure'], 3)} {bar['unit']}".rstrip(),
            f"{rounded(bar['limit'], 3)} {bar['unit']}".rstrip(),
            "yes" if bar["met"] else "NO",
        )
        for bar in result["bars"]
    )
    return Table(BARS, ("bar", "measured", "at most", "met"), rows, "Medians of this one run.")


def missed(result: Result) -> list[str]:
    """The names of the bars that are not met."""
    return [bar["name"] for bar in result["bars"] if not bar["met"]]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return rounded(value, 4) if isinstance(value, float) else str(value)


def check_file(path: Path) -> None:
    """Refuse, before any work is done, a file that could not be written.

    Raises:
        ResultError: the name does not end in .json, or its folder is not there.
    """
    if path.suffix != ".json":
        raise ResultError(f"{path} must end in .json; the rows go beside it as .csv.")
    if not path.parent.is_dir():
        raise ResultError(f"{path} lies in a folder that does not exist; create {path.parent} first.")


def write_data(result: Result, path: Path) -> list[Path]:
    """Write a result as JSON, and its rows as CSV beside it.

    Returns:
        The files.

    Raises:
        ResultError: a file cannot be written.
    """
    write_json(path, result)
    beside = path.with_suffix(".csv")
    names = list(dict.fromkeys(name for row in result["rows"] for name in row))
    with written_whole(beside) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(result["rows"])
    return [path, beside]


def write(result: Result, folder: Path) -> list[Path]:
    """Write a result to a folder as JSON, CSV, Markdown and a figure, all named after the suite.

    Returns:
        The files; those of these names are replaced.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ResultError: a file cannot be written.
    """
    pages.prepare(folder)
    name = result["suite"]
    files, figure = write_data(result, folder / f"{name}.json"), f"{name}.png"
    page = folder / f"{name}.md"
    return [*files, *pages.write(page, markdown(result, figure), {figure: partial(draw, result)})]


def markdown(result: Result, figure: str) -> str:
    """The page: what was run on what, the tables, the figure."""
    hardware = result["hardware"]
    cores, threads = counted(hardware["cores"], "core"), counted(hardware["threads"], "thread")
    facts = {
        "size": result["size"],
        **pages.software(result),
        "machine": f"{hardware['cpu']}, {cores}, {threads}",
    }
    if hardware["gpus"]:
        facts["GPU"] = ", ".join(hardware["gpus"])
    return pages.markdown(f"Suite {result['suite']}", facts, tables(result), [figure])


def draw(result: Result, plot: Any) -> Any:
    """One figure of the suite's most telling field: lines against numbers, bars against categories."""
    suite = SUITES[result["suite"]]
    rows = [row for row in result["rows"] if all(row.get(name) == value for name, value in suite.only)]
    series: dict[str, dict[Any, float]] = {}
    for row in rows:
        if row.get(suite.up) is not None:
            label = " ".join(
                f"{name} {row[name]}" if name == "batch" else str(row[name]) for name in _lines(suite, row)
            )
            series.setdefault(label.strip(), {})[row[suite.across]] = row[suite.up]
    across = list(dict.fromkeys(row[suite.across] for row in rows if suite.across in row))
    figure, ((axes,),) = pages.canvas(plot, (8, 4))
    if all(isinstance(one, int | float) for one in across):
        for label, points in series.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), label=label, **pages.POINTS)
        if suite.powers:
            axes.loglog(base=2)
        else:
            axes.set_ylim(bottom=0)
    else:
        width = 0.8 / max(1, len(series))
        for number, (label, points) in enumerate(series.items()):
            places = [across.index(one) + (number - (len(series) - 1) / 2) * width for one in points]
            axes.bar(places, list(points.values()), width=0.9 * width, label=label)
        axes.set_xticks(range(len(across)), [one or "untrimmed" for one in across])
    axes.set(xlabel=suite.across, ylabel=suite.up, title=suite.name)
    pages.legend(figure, "outside right upper", fontsize=7)
    axes.grid(axis="y", **pages.GRID)
    return figure


def _lines(suite: Suite, row: Mapping[str, Any]) -> list[str]:
    return [name for name in suite.lines if row.get(name) not in (None, "")]
