"""`crosstrim bench`: time and memory, untrimmed and trimmed, on random models of real shapes and on mini."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from crosstrim.bench import names
from crosstrim.cli import console, options


def bench(
    suite: Annotated[
        str,
        typer.Argument(metavar="SUITE", help="What to measure: " + ", ".join(names.SUITES) + ".", show_default=False),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Measure less, in about a minute.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Hold the figures against the suite's bars; exit with 1 if one is missed.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.json", help="Write the result to this file, and its rows to FILE.csv."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FOLDER", help="Write JSON, CSV, a page and a figure to this folder."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure time and memory, untrimmed and trimmed, taking turns in one process.

    No weights are needed: layers have the shapes of Llama-3.2-Vision 11B and random weights, and sessions and whole
    generations run on the embedded mini. Only the suite gpu needs a GPU. A busy machine gives wrong times.

    Try: crosstrim bench layers --quick --check
    """
    from crosstrim.bench import page, suites
    from crosstrim.data import pages

    if suite not in names.SUITES:
        raise typer.BadParameter(f"SUITE {suite} must be one of {', '.join(names.SUITES)}.")
    if out is not None:
        page.check_file(out)
    if to is not None:
        pages.prepare(to)
    with console.progress("rows") as steps:

        def saved(result: dict[str, Any]) -> None:
            steps(len(result["rows"]), None)
            if out is not None:  # what was measured stays, whatever happens to the rest
                page.write_data(result, out)

        result = suites.measure(suites.SUITES[suite], "quick" if quick else "full", saved)
    files = [] if out is None else page.write_data(result, out)
    files += [] if to is None else page.write(result, to)
    for file in files:
        console.say(f"wrote {file}")
    if json:
        console.print_json(result)
    else:
        shown = page.tables(result)
        console.print_tables(table for table in shown if check or table.title != page.BARS)
    missed = page.missed(result) if check else []
    for name in missed:
        console.say(f"missed: {name}")
    if missed:
        raise typer.Exit(1)
