"""The verbs of the command line, and what they share as one program."""

from __future__ import annotations

from typing import Annotated

import typer

import crosstrim
from crosstrim.cli import analyze, ask, batch, bench, calibrate, doctor, evaluate, examples, play, serve
from crosstrim.cli.console import ModelVerb, Verb

app = typer.Typer(
    name="crosstrim",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crosstrim {crosstrim.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Trim the image features that a cross-attention vision-language model keeps, without training.

    Results go to stdout, everything else to stderr; --json makes the result one JSON object.
    """


app.command("ask", cls=ModelVerb)(ask.ask)
app.command("examples", cls=Verb)(examples.examples)
app.command("eval", cls=ModelVerb)(evaluate.evaluate)
app.command("calibrate", cls=ModelVerb)(calibrate.calibrate)
app.command("analyze", cls=ModelVerb)(analyze.analyze)
app.command("bench", cls=ModelVerb)(bench.bench)
app.command("batch", cls=ModelVerb)(batch.batch)
app.command("serve", cls=ModelVerb)(serve.serve)
app.command("play", cls=ModelVerb)(play.play)
app.command("doctor", cls=ModelVerb)(doctor.doctor)
