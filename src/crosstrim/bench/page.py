"""A suite's result as tables, as files and as a figure."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crosstrim.bench.suites import SUITES, Suite
from crosstrim.errors import ResultError
from crosstrim.eval.analysis_page import Table, markdown_table, prepare
from crosstrim.eval.sweep_page import pyplot
from crosstrim.files import write_json
from crosstrim.wording import counted, rounded

Result = Mapping[str, Any]


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
    return Table("bars", ("bar", "measured", "at most", "met"), rows, "Medians of this one run.")


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
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(result["rows"])
    except OSError as error:
        raise ResultError(f"{beside} cannot be written: {error.strerror}.") from error
    return [path, beside]


def write(result: Result, folder: Path) -> list[Path]:
    """Write a result to a folder as JSON, CSV, Markdown and a figure, all named after the suite.

    Returns:
        The files; those of these names are replaced.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ResultError: a file cannot be written.
    """
    prepare(folder)
    plot, suite = pyplot(), SUITES[result["suite"]]
    files = write_data(result, folder / f"{suite.name}.json")
    page, figure = folder / f"{suite.name}.md", folder / f"{suite.name}.png"
    try:
        drawn = draw(result, plot)
        drawn.savefig(figure, dpi=150)
        plot.close(drawn)
        page.write_text(markdown(result, figure.name), encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{folder} cannot be written to: {error.strerror}.") from error
    return [*files, page, figure]


def markdown(result: Result, figure: str) -> str:
    """The page: what was run on what, the tables, the figure."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    hardware = result["hardware"]
    lines = [f"# Suite {result['suite']}", ""]
    lines += [f"- size: {result['size']}", f"- versions: {versions}"]
    cores, threads = counted(hardware["cores"], "core"), counted(hardware["threads"], "thread")
    lines += [f"- machine: {hardware['cpu']}, {cores}, {threads}"]
    lines += [f"- GPU: {name}" for name in hardware["gpus"]]
    for table in tables(result):
        lines += ["", f"## {table.title}", "", *markdown_table(table), "", table.note]
    return "\n".join([*lines, "", f"![{result['suite']}]({figure})", ""])


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
    figure, axes = plot.subplots(figsize=(8, 4), layout="constrained")
    if all(isinstance(one, int | float) for one in across):
        for label, points in series.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=4, label=label)
        axes.set_ylim(bottom=0)
    else:
        width = 0.8 / max(1, len(series))
        for number, (label, points) in enumerate(series.items()):
            places = [across.index(one) + (number - (len(series) - 1) / 2) * width for one in points]
            axes.bar(places, list(points.values()), width=0.9 * width, label=label)
        axes.set_xticks(range(len(across)), [one or "untrimmed" for one in across])
    axes.set(xlabel=suite.across, ylabel=suite.up, title=suite.name)
    figure.legend(frameon=False, fontsize=7, loc="outside right upper")
    axes.grid(alpha=0.25, axis="y")
    return figure


def _lines(suite: Suite, row: Mapping[str, Any]) -> list[str]:
    return [name for name in suite.lines if row.get(name) not in (None, "")]
