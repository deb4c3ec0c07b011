"""Results for people: tables, and pages in Markdown with figures, all in one style."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosstrim.errors import MissingExtraError, ResultError
from crosstrim.files import write_text, written_whole

Result = Mapping[str, Any]

Drawer = Callable[[Any], Any]
"""Draws a matplotlib figure, given matplotlib.pyplot."""


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        title: what it shows.
        header: of its columns.
        rows: cells, as many as the header has.
        note: how to read it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str

    def markdown(self) -> list[str]:
        """Its lines in Markdown: the first column to the left, the others to the right."""
        dashes = ("---", *["---:"] * (len(self.header) - 1))
        return [f"| {' | '.join(cells)} |" for cells in (self.header, dashes, *self.rows)]


def software(result: Result) -> dict[str, str]:
    """What a page says of the versions that a result was made with, and of the repairs of its model."""
    facts = {"versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items())}
    if "model" in result:
        facts["repairs"] = ", ".join(name for name, on in result["compat"].items() if on) or "none"
    return facts


def markdown(
    title: str, facts: Mapping[str, str], tables: Iterable[Table], figures: Iterable[str], intro: str = ""
) -> str:
    """A page: what was run, how to read it, every table, every figure.

    Args:
        title: of the page.
        facts: what was run, each fact by its name.
        tables: in order.
        figures: the names of their files, beside the page.
        intro: what to know before the tables.
    """
    lines = [f"# {title}", "", *(f"- {name}: {fact}" for name, fact in facts.items())]
    lines += ["", intro] if intro else []
    for table in tables:
        lines += ["", f"## {table.title}", "", *table.markdown(), "", table.note]
    lines += ["", "## Figures", "", *(f"![{Path(name).stem}]({name})\n" for name in figures)]
    return "\n".join(lines).rstrip() + "\n"


def prepare(folder: Path) -> Any:
    """Make the folder, and refuse before any work is done what `write` could not do.

    Returns:
        matplotlib.pyplot.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ResultError: the folder cannot be made.
    """
    plot = pyplot()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"{folder} cannot be written to: {error.strerror}.") from error
    return plot


def write(page: Path, text: str, figures: Mapping[str, Drawer]) -> list[Path]:
    """Write a page, and its figures beside it, into a folder, which is made if there is none.

    Args:
        page: the file; those of these names are replaced.
        text: of the page.
        figures: what draws each file.

    Returns:
        The files, the page first.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ResultError: a file cannot be written.
    """
    plot = prepare(page.parent)
    for name, draw in figures.items():
        figure = draw(plot)
        with written_whole(page.with_name(name)) as unfinished:
            figure.savefig(unfinished, dpi=150)
        plot.close(figure)
    write_text(page, text)
    return [page, *(page.with_name(name) for name in figures)]


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError(
            "drawing figures needs matplotlib, which is not installed: pip install 'crosstrim[viz]'."
        ) from error
    matplotlib.use("agg", force=False)
    from matplotlib import pyplot

    return pyplot


def canvas(plot: Any, size: tuple[float, float], down: int = 1, across: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of this size in inches, which makes room for legends, and its axes, [down, across]."""
    figure, grid = plot.subplots(down, across, figsize=size, layout="constrained", squeeze=False, **options)
    return figure, grid


def legend(owner: Any, where: str, **options: Any) -> None:
    """The legend of a figure or of axes, where it lies on the page; of a figure: "outside ..."."""
    owner.legend(**{"frameon": False, "fontsize": 8, "loc": where, **options})


def level(axes: Any, height: float, **options: Any) -> None:
    """A dotted line at what the others are compared with."""
    axes.axhline(height, **{"color": "0.5", "linewidth": 1, "linestyle": ":", **options})


POINTS = {"marker": "o", "markersize": 4, "linewidth": 1.4}
"""How a line through measured points is drawn."""

GRID = {"alpha": 0.25}
TITLE = {"fontsize": 9}
