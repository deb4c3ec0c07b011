"""`crosstrim doctor`: what is installed here, and whether transformers departs from the reference."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from crosstrim.cli import console, options


def doctor(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Load this model as well, and say which repairs it carries."),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Describe this installation: versions, devices, extras, and known departures of transformers.

    A departure is found by running the installed code; crosstrim repairs it on every model that it loads.
    """
    from crosstrim.asking import environment

    loaded = None if model is None else options.load_model(model, dtype, device)[0]
    found = environment.describe(loaded)
    if json:
        console.print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 3))
    for name, version in found["versions"].items():
        table.add_row(name, version)
    table.add_row("CUDA devices", ", ".join(found["cuda"]) or "none")
    table.add_row("CPU threads", str(found["threads"]))
    for name, is_there in found["extras"].items():
        table.add_row(f"extra {name}", "installed" if is_there else f"not installed: pip install 'crosstrim[{name}]'")
    for name, value in found.get("model", {}).items():
        table.add_row(f"model {name.replace('_', ' ')}", str(value))
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
