"""`crosstrim eval`: what trimming costs in accuracy, on the embedded model's held-out questions or on your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from crosstrim.cli import console, eval_options, options
from crosstrim.data.journal import journal_of
from crosstrim.eval import defaults
from crosstrim.wording import rounded


def evaluate(
    context: typer.Context,
    quick: eval_options.Quick = False,
    out: eval_options.Out = None,
    data: eval_options.Data = None,
    on_error: eval_options.OnError = "stop",
    k: eval_options.Ks = None,
    keep: eval_options.Keeps = None,
    lossless: options.Lossless = False,
    policy: eval_options.Policies = None,
    first_layer: eval_options.FirstLayer = None,
    seeds: eval_options.Seeds = None,
    rating_rows: options.RatingRows = "all",
    k_base: options.KBase = "visible",
    whole_first_layer: options.WholeFirstLayer = False,
    kv_dtype: eval_options.KvDtypes = None,
    merge: eval_options.Merge = False,
    escalate: eval_options.Escalate = None,
    escalate_to: options.EscalateTo = None,
    batch_size: eval_options.BatchSize = 64,
    max_new_tokens: eval_options.MaxNewTokens = None,
    report: eval_options.Report = None,
    to: eval_options.To = None,
    model: options.Model = "mini",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    json: options.Json = False,
) -> None:
    """Measure accuracy and kept image features, untrimmed and trimmed, on held-out questions.

    The questions are those of the embedded mini: digits on photographs that its training never saw. An answer is
    right when it is the expected one; case and a full stop at its end do not count.

    With --out several trims are compared, on these questions or on those of --data.
    """
    from crosstrim.eval import heldout, settings, sweep

    trims: dict[str, Any] = {"lossless": lossless, "rating_rows": rating_rows, "k_base": k_base}
    load = partial(options.load_model, model, dtype, device, quantize)
    if report is not None:
        options.refuse_others(context, "--report", {"report", "to", "json"})
        _draw(report, to, json)
    elif out is None:
        _require("--out FILE.json", data=data, first_layer=first_layer, seeds=seeds, max_new_tokens=max_new_tokens)
        _require("--out FILE.json", escalate=escalate, escalate_to=escalate_to)
        _require("--report FILE.json", to=to)
        if defaults.ORACLE in (policy or ()):
            raise typer.BadParameter("--policy oracle goes with --out FILE.json, whose runs can look ahead.")
        config = options.trim_config(
            k=_single("--k", k),
            keep=_single("--keep", keep),
            policy=_single("--policy", policy),
            whole_first_layer=whole_first_layer,
            kv_dtype=_single("--kv-dtype", kv_dtype),
            merge=merge,
            **trims,
        )
        loaded, processor = load()
        with console.progress("questions") as steps:
            found = heldout.evaluate(loaded, processor, config, quick=quick, batch_size=batch_size, progress=steps)
        _show({"model": model, **found}, _pair_table, json)
    else:
        _require("--report FILE.json", to=to)
        if k_base != "visible" and not k:
            raise typer.BadParameter("--k-base goes with --k.")
        if first_layer is not None and whole_first_layer:
            raise typer.BadParameter("--first-layer and --whole-first-layer say the same thing; give one of them.")
        if escalate is None:
            _require("--escalate", escalate_to=escalate_to)
        cache = first_layer or ("whole" if whole_first_layer else "trimmed")
        chosen = settings.expand(
            policy or (),
            k=k or (),
            keep=keep or (),
            first_layer=cache,
            kv_dtypes=kv_dtype or (None,),
            merge=(False, True) if merge else (False,),
            seeds=seeds or defaults.SEEDS,
            escalate=escalate,
            escalate_to=escalate_to or settings.UNTRIMMED,
            **trims,
        )
        sweep.check_path(out)
        questions = eval_options.questions(data, on_error, quick)
        limit = max_new_tokens or (defaults.HELDOUT_TOKENS if data is None else defaults.DATA_TOKENS)
        loaded, processor = load()
        sizes = {"batch_size": batch_size, "max_new_tokens": limit}
        was_there = out.exists()
        with console.resumable(journal_of(out), "the same command"), console.progress("answers") as steps:
            found = sweep.run(loaded, processor, questions, chosen, out, name=model, progress=steps, **sizes)
        console.say_written(out, was_there)
        _show(sweep.without_answers(found), _sweep_table, json)


def _draw(result: Path, folder: Path | None, json: bool) -> None:
    from crosstrim.eval import sweep, sweep_page

    files = sweep_page.write(sweep.read(result), folder or result.with_suffix(""))
    console.print_files(files, json)


def _single(name: str, values: list[Any] | None) -> Any:
    if values and len(values) > 1:
        raise typer.BadParameter(f"several {name} are compared with --out FILE.json; without it give one.")
    return values[0] if values else None


def _require(missing: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter(f"--{name.replace('_', '-')} goes with {missing}.")


def _show(result: Mapping[str, Any], table: Callable[[Mapping[str, Any]], Table], json: bool) -> None:
    if json:
        console.print_json(dict(result))
    else:
        console.print_rich(table(result))


def _pair_table(result: Mapping[str, Any]) -> Table:
    untrimmed, trimmed = result["untrimmed"], result["trimmed"]
    table = console.grid("kind", "questions", "untrimmed", "trimmed", "kept")
    for kind, count in result["questions_per_kind"].items():
        accuracies = [f"{one['accuracy']['kinds'][kind]:.1%}" for one in (untrimmed, trimmed)]
        table.add_row(kind, str(count), *accuracies, f"{trimmed['kept_fraction']['kinds'][kind]:.1%}")
    overall = [f"{one['accuracy']['overall']:.1%}" for one in (untrimmed, trimmed)]
    table.add_row("overall", str(result["questions"]), *overall, f"{trimmed['kept_fraction']['overall']:.1%}")
    return table


def _sweep_table(result: Mapping[str, Any]) -> Table:
    table = console.grid("setting", "kept", "accuracy", "95 % band", "unchanged", "KL")
    for row in result["summary"]:
        cell = row["overall"]
        accuracy = cell["accuracy"]
        band = f"{accuracy['low']:.1%} to {accuracy['high']:.1%}"
        shares = [f"{cell['kept_fraction']:.1%}", f"{accuracy['mean']:.1%}", band, f"{cell['unchanged']['mean']:.1%}"]
        table.add_row(row["group"], *shares, rounded(cell["kl"], 2))
    return table
