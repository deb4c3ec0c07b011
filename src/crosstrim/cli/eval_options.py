"""The options of `crosstrim eval`, and what others share of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosstrim import mini
from crosstrim.cli import console, options
from crosstrim.eval import defaults

if TYPE_CHECKING:
    from crosstrim.data.dataset import Dataset

REPEAT = "Repeat it to compare, with --out."

Quick = Annotated[
    bool, typer.Option("--quick", help=f"Ask only {mini.QUICK} questions of each kind and tile layout.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE.json",
        help="Compare trims, and write every answer to this file. After a kill the same command goes on.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Ask the questions of a .jsonl or .parquet file; with --out."),
]
OnError = Annotated[
    str,
    typer.Option(
        "--on-error",
        metavar="stop|skip",
        help="Whether rows of --data that cannot be asked end the run or stay out.",
    ),
]
Ks = Annotated[
    list[float] | None,
    typer.Option(
        "--k",
        metavar="SHARE",
        help=f"{options.K_HELP}, without --out. {REPEAT}",
    ),
]
Keeps = Annotated[
    list[Any] | None,
    typer.Option(
        "--keep",
        metavar="SHARE|COUNT",
        parser=options.parse_keep,
        help=f"{options.KEEP_HELP} {REPEAT} Then the default is {', '.join(map(str, defaults.KEEPS))}.",
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        help=f"{options.POLICY_HELP} {REPEAT} Then there is also {defaults.ORACLE}, which looks ahead, and the "
        f"default is {', '.join(defaults.POLICIES)}.",
    ),
]
FirstLayer = Annotated[
    str | None,
    typer.Option(
        "--first-layer",
        metavar="trimmed|whole|both",
        help="What becomes of the first cross-attention layer's own cache; with --out.",
    ),
]
KvDtypes = Annotated[
    list[Any] | None,
    typer.Option(
        "--kv-dtype",
        metavar="model|int8|fp8",
        parser=options.parse_kv_dtype,
        help=f"{options.KV_DTYPE_HELP} {REPEAT}",
    ),
]
Merge = Annotated[
    bool,
    typer.Option("--merge", help=f"{options.MERGE_HELP} With --out every trim that drops runs without and with it."),
]
Escalate = Annotated[
    float | None,
    typer.Option(
        "--escalate",
        metavar="PROBABILITY",
        help="Make answers again that had a token of a lower probability; with --out. Every trim that drops runs "
        "without and with it.",
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(
        "--seeds", metavar="COUNT", min=1, help=f"How often random draws; with --out. Default: {defaults.SEEDS}."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="COUNT", min=1, help="Questions per batch.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="COUNT",
        min=1,
        help=f"Where to cut answers off; with --out. Default: {defaults.HELDOUT_TOKENS}, with --data "
        f"{defaults.DATA_TOKENS}.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.json", help="Run nothing: draw what an earlier --out wrote."),
]
To = Annotated[
    Path | None,
    typer.Option("--to", metavar="FOLDER", help="Where --report writes. Default: FILE without its ending."),
]


def questions(
    data: Path | None, on_error: str, quick: bool = False, question: str | None = None, *, labelled: bool = True
) -> Dataset:
    """Those of --data, as of `dataset.read`, or of the embedded benchmark; rows that cannot be asked are told."""
    from crosstrim.data import dataset

    if on_error not in dataset.ON_ERROR:
        raise typer.BadParameter(f"--on-error {on_error} must be one of {', '.join(dataset.ON_ERROR)}.")
    if data is None:
        return dataset.embedded(quick)
    with console.progress("rows") as steps:
        found = dataset.read(data, question, labelled=labelled, progress=lambda row: steps(row, None))
    if found.passed_over is not None:
        console.say(found.passed_over)
    for complaint in found.complaints():
        console.say(complaint)
    found = found.usable(on_error)
    return found.first_of_each_kind(mini.QUICK) if quick else found
