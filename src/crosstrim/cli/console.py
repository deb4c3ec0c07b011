"""What every verb shares: where output goes, how errors end, and silence from the libraries."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from crosstrim.data import pages
from crosstrim.errors import ConfigError, CrosstrimError, UnwritableError

Steps = Callable[[int, int | None], None]
"""Called with how much is done, and of how much where that is known."""


class Verb(TyperCommand):
    """A verb; an error that crosstrim words itself ends with one line and no traceback.

    The exit code is 2 where an option's value is refused, as for every other wrong usage, and otherwise 1.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        try:
            return super().invoke(ctx)
        except CrosstrimError as error:
            say(" ".join(str(error).splitlines()))
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


class ModelVerb(Verb):
    """A verb that runs a model, or knows about those that can be run."""

    def invoke(self, ctx: Any) -> Any:
        """Run it. Until here torch and transformers are not imported, which takes seconds that no help needs."""
        with _quiet_libraries():
            try:
                return super().invoke(ctx)
            except RuntimeError as error:
                import torch

                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                say("the device ran out of memory; try --dtype bfloat16, a smaller batch, or --device auto or cpu.")
                raise typer.Exit(1) from error


def say(line: str) -> None:
    """Tell the person something that is no result."""
    typer.echo(f"crosstrim: {line}", err=True)


def print_json(result: dict[str, Any]) -> None:
    """Write the result, and nothing else, as one line of JSON."""
    typer.echo(json.dumps(result))


def print_files(files: Iterable[Path], as_json: bool) -> None:
    """Write which files were made, one a line or as one JSON object."""
    if as_json:
        print_json({"files": list(map(str, files))})
    else:
        typer.echo("\n".join(map(str, files)))


def print_rich(*results: RenderableType) -> None:
    """Write tables for people; a pipe gets them unfolded and without colours."""
    # Square brackets and colons are what they are: no markup, no emoji.
    piped = not sys.stdout.isatty()
    console = Console(
        file=sys.stdout, width=1000 if piped else None, soft_wrap=piped, highlight=False, markup=False, emoji=False
    )
    for result in results:
        if isinstance(result, Table):
            # Between words a cell may be folded; a terminal too narrow for the words gets longer lines, uncut.
            for column in result.columns:
                column.min_width = max(console.measure(cell).minimum for cell in column.cells)
        console.print(result, crop=False)


def grid(*header: str) -> Table:
    """A table without lines, its first column to the left and the others to the right."""
    table = Table.grid(padding=(0, 3))
    for _ in header:
        table.add_column(justify="right" if table.columns else "left")
    table.add_row(*header)
    return table


def print_tables(tables: Iterable[pages.Table]) -> None:
    """Write tables with their titles above them and their notes below."""
    for number, table in enumerate(tables):
        shown = grid(*table.header)
        for row in table.rows:
            shown.add_row(*row)
        print_rich(*[""] * (number > 0), table.title, "", shown, "", table.note)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Steps]:
    """A bar on stderr while the block runs, where somebody watches."""
    screen = Console(file=sys.stderr)
    if not screen.is_terminal:
        yield lambda done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def resumable(journal: Path, how: str) -> Iterator[None]:
    """Say how to go on where the block was interrupted, or the disk is full, and left a journal."""
    try:
        yield
    except (KeyboardInterrupt, UnwritableError):
        if journal.exists():
            say(f"interrupted; what is done is kept, and {how} goes on.")
        raise


def say_written(out: Path, was_there: bool) -> None:
    """Tell where the result is, and whether this run made it."""
    say(f"{out} is complete already; nothing was run." if was_there else f"wrote {out}")


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Let transformers say nothing but errors, and warnings take one line on stderr."""
    from crosstrim.models.names import silent_transformers

    with warnings.catch_warnings(), silent_transformers():
        # Whoever runs a command cannot change what a library's author is told.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
        yield
