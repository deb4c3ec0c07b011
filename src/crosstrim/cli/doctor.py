"""`crosstrim doctor`: what is installed here, and whether transformers departs from the reference."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from crosstrim.cli import console, options
from crosstrim.memory import SHAPES


def doctor(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Load this model as well, and say which repairs it carries."),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    card: Annotated[
        float | None,
        typer.Option(
            "--card",
            metavar="GB",
            min=1,
            help="Load nothing: compute what fits on a card of this size, of --model or of --shape. Default: of both "
            "shapes.",
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", metavar="|".join(SHAPES), help="A Llama-3.2-Vision; with --card.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Describe this installation: versions, devices, extras, and known departures of transformers.

    A departure is found by running the installed code; crosstrim repairs it on every model that it loads.
    With --card, say instead how large a model is in each precision, and how many pictures fit beside it.
    """
    from crosstrim.asking import environment

    if card is not None:
        options.refuse_others(context, "--card", {"card", "model", "shape", "json"})
        _show_what_fits(card, model, shape, json)
        return
    if shape is not None:
        raise typer.BadParameter("--shape goes with --card GB.")
    loaded = None if model is None else options.load_model(model, dtype, device, quantize)[0]
    found = environment.describe(loaded)
    if json:
        console.print_json(found)
    else:
        _print(found)


def _show_what_fits(card: float, model: str | None, shape: str | None, json: bool) -> None:
    from crosstrim.asking import loading
    from crosstrim.eval import card_table

    if model is not None and shape is not None:
        raise typer.BadParameter("--model and --shape are two models; give one of them.")
    if shape is not None and shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape} must be one of {', '.join(SHAPES)}.")
    if model is not None:
        tables = [card_table.of_config(loading.read_config(model), model, card)]
    else:
        tables = [card_table.of_shape(name, card) for name in SHAPES if shape in (None, name)]
    if json:
        console.print_json({"models": tables})
    else:
        console.print_tables(card_table.table(one) for one in tables)


def _print(found: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 3))
    for name, version in found["versions"].items():
        table.add_row(name, version)
    table.add_row("CUDA devices", ", ".join(found["cuda"]) or "none")
    table.add_row("CPU threads", str(found["threads"]))
    for name, is_there in found["extras"].items():
        table.add_row(f"extra {name}", "installed" if is_there else f"not installed: pip install 'crosstrim[{name}]'")
    for name, value in found.get("model", {}).items():
        table.add_row(f"model {name.replace('_', ' ')}", "none" if value is None else str(value))
    trimming = found["trimming"]
    table.add_row("trimming", "works with this transformers" if trimming["works"] else f"NO: {trimming['problem']}")
    console.print_rich(table, "", "Where the installed transformers departs from the reference:")
    for finding in found["compat"]:
        console.print_rich(f"  {finding['name']}: {_state(finding, has_model='model' in found)}")


def _state(finding: dict[str, Any], has_model: bool) -> str:
    if not finding["departs"]:
        return "it does not"
    if has_model:
        state = "repaired on this model" if finding["repaired"] else "NOT repaired on this model"
    else:
        state = "repaired on every model that crosstrim loads"
    return f"{state}; {finding['summary']} ({finding['reference']})"
