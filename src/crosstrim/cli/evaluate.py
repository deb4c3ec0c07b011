"""`crosstrim eval`: what trimming costs in accuracy, on the embedded model's held-out questions."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from crosstrim.cli import console, options
from crosstrim.eval import heldout


def evaluate(
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"Ask only {heldout.QUICK} questions of each kind and tile layout."),
    ] = False,
    k: options.K = None,
    keep: options.Keep = None,
    lossless: options.Lossless = False,
    policy: options.Policy = "union",
    rating_rows: options.RatingRows = "all",
    k_base: options.KBase = "visible",
    whole_first_layer: options.WholeFirstLayer = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="COUNT", min=1, help="Questions per batch.")
    ] = 64,
    model: options.Model = "mini",
    dtype: options.Dtype = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure accuracy and kept image features, untrimmed and trimmed, on held-out questions.

    The questions are those of the embedded mini: digits on photographs that its training never saw. An answer is
    right when it is exactly the expected one.
    """
    config = options.trim_config(
        k=k,
        keep=keep,
        lossless=lossless,
        policy=policy,
        rating_rows=rating_rows,
        k_base=k_base,
        whole_first_layer=whole_first_layer,
    )
    loaded, processor = options.load_model(model, dtype, device)
    screen = console.progress_console()
    # Where nobody watches, even an empty bar would leave a line.
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("questions")
        result = heldout.evaluate(
            loaded,
            processor,
            config,
            quick=quick,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    result = {"model": model, **result}
    if json:
        console.print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    untrimmed, trimmed = result["untrimmed"], result["trimmed"]
    table = Table.grid(padding=(0, 3))
    for _ in range(5):
        table.add_column(justify="left" if not table.columns else "right")
    table.add_row("kind", "questions", "untrimmed", "trimmed", "kept")
    for kind, count in result["questions_per_kind"].items():
        accuracies = [f"{one['accuracy']['kinds'][kind]:.1%}" for one in (untrimmed, trimmed)]
        table.add_row(kind, str(count), *accuracies, f"{trimmed['kept_fraction']['kinds'][kind]:.1%}")
    overall = [f"{one['accuracy']['overall']:.1%}" for one in (untrimmed, trimmed)]
    table.add_row("overall", str(result["questions"]), *overall, f"{trimmed['kept_fraction']['overall']:.1%}")
    console.print_rich(table)
