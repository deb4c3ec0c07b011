"""`crosstrim examples`: the pictures that ship with crosstrim, and what can be asked about them."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from crosstrim import mini
from crosstrim.cli import console, options


def examples(json: options.Json = False) -> None:
    """List the example pictures and questions that crosstrim ships with, and their right answers.

    A picture's name can be given to crosstrim ask in place of a file.
    """
    rows = [{"name": Path(example["image"]).stem, **example} for example in mini.examples()]
    if json:
        console.print_json({"examples": rows})
        return
    table = Table.grid(padding=(0, 3))
    table.add_row("picture", "question", "answer")
    for row in rows:
        for number, asked in enumerate(row["questions"]):
            table.add_row(row["name"] if number == 0 else "", asked["question"], " or ".join(asked["answers"]))
    console.print_rich(table)
