"""`crosstrim calibrate`: the smallest budget that is safe for one's own questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from crosstrim.cli import console, eval_options, options
from crosstrim.data.journal import journal_of
from crosstrim.errors import CalibrationError
from crosstrim.eval import defaults
from crosstrim.wording import percent


def calibrate(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="A .jsonl or .parquet file, or a folder of pictures. Default: mini's held-out questions.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option("--question", metavar="TEXT", help="What to ask where DATA has no question of its own."),
    ] = None,
    risk: Annotated[
        float, typer.Option("--risk", metavar="SHARE", help="How many of the answers may be lost, as a share.")
    ] = defaults.RISK,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="SHARE", help="How sure to be of that.")
    ] = defaults.CONFIDENCE,
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            metavar="answer|wrong",
            help="answer: one that is not the untrimmed model's is lost. wrong: one that was right untrimmed and is "
            "wrong trimmed is, by the column 'answers'.",
        ),
    ] = "answer",
    k: Annotated[
        list[float] | None,
        typer.Option("--k", metavar="SHARE", help="Test this share for every head. Repeat it for more budgets."),
    ] = None,
    keep: Annotated[
        list[Any] | None,
        typer.Option(
            "--keep",
            metavar="SHARE|COUNT",
            parser=options.parse_keep,
            help="Test this share or number of each image's visible features. Repeat it for more budgets. Default: "
            f"{', '.join(map(str, defaults.KEEPS))}.",
        ),
    ] = None,
    policy: options.Policy = None,
    rating_rows: options.RatingRows = "all",
    k_base: options.KBase = "visible",
    whole_first_layer: options.WholeFirstLayer = False,
    kv_dtype: options.KvDtype = None,
    merge: options.Merge = False,
    escalate: Annotated[
        list[float] | None,
        typer.Option(
            "--escalate",
            metavar="PROBABILITY",
            help="Test the budgets with answers made again untrimmed that had a token of a lower probability. Repeat "
            "it for more thresholds.",
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions",
            metavar="COUNT",
            min=1,
            help=f"How many to draw. Default: {defaults.CALIBRATED_ON}, or all where there are fewer.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="NUMBER", min=0, help="Of the draw.")] = 0,
    on_error: Annotated[
        str,
        typer.Option(
            "--on-error",
            metavar="stop|skip",
            help="Whether rows of DATA that cannot be asked end the run or stay out.",
        ),
    ] = "stop",
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE.json",
            help="Write every answer and what follows to this file. After a kill the same command goes on.",
        ),
    ] = Path("calibration.json"),
    batch_size: eval_options.BatchSize = 32,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="COUNT",
            min=1,
            help=f"Where to cut answers off. Default: {defaults.DATA_TOKENS}, "
            f"without DATA {defaults.HELDOUT_TOKENS}.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.json", help="Run nothing: draw what an earlier run wrote."),
    ] = None,
    to: eval_options.To = None,
    model: options.Model = "mini",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    json: options.Json = False,
) -> None:
    """Find the smallest budget that loses at most a share of the answers to questions like yours, with a guarantee.

    Needs no right answers: what counts is whether trimming changes the model's own. `ask`, `batch` and `serve` trim
    as was found by --calibrated FILE.json. docs/calibration.md says what is promised, and what is not.
    """
    from crosstrim.eval import calibrate as calibration
    from crosstrim.eval import sweep
    from crosstrim.eval.rules import rules_of

    if report is not None:
        options.refuse_others(context, "--report", {"report", "to", "json"})
        _draw(report, to, json)
        return
    if to is not None:
        raise typer.BadParameter("--to goes with --report FILE.json.")
    if k_base != "visible" and not k:
        raise typer.BadParameter("--k-base goes with --k.")
    budgets: dict[str, Any] = {
        "k": k or (),
        "keep": keep or (),
        "policy": policy,
        "rating_rows": rating_rows,
        "k_base": k_base,
        "trim_first_layer": not whole_first_layer,
        "kv_dtype": kv_dtype,
        "merge": merge,
    }
    rules_of(calibration.budgets(**budgets), escalate or ())
    calibration.check(risk, confidence, loss)
    sweep.check_path(out)
    found = eval_options.questions(data, on_error, question=question, labelled=loss == "wrong")
    drawn = calibration.draw(found, questions, seed)
    calibration.check_count(len(drawn.items), risk, confidence)
    loaded, processor = options.load_model(model, dtype, device, quantize)
    was_there = out.exists()
    with console.resumable(journal_of(out), "the same command"), console.progress("answers") as steps:
        result = calibration.calibrate(
            loaded,
            processor,
            found,
            out,
            **budgets,
            risk=risk,
            confidence=confidence,
            loss=loss,
            escalate=escalate or (),
            questions=questions,
            seed=seed,
            name=model,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens or (defaults.HELDOUT_TOKENS if data is None else defaults.DATA_TOKENS),
            progress=steps,
        )
    console.say_written(out, was_there)
    if json:
        console.print_json(sweep.without_answers(result))
    else:
        _print(result)
    if result["refusal"] is not None:
        raise CalibrationError(f"no budget is certified: {result['refusal']}")


def _draw(result: Path, folder: Path | None, json: bool) -> None:
    from crosstrim import calibrated
    from crosstrim.eval import calibrate_page

    files = calibrate_page.write(calibrated.read(result), folder or result.with_suffix(""))
    console.print_files(files, json)


def _print(result: dict[str, Any]) -> None:
    again = "escalate" in result["calibration"]
    table = console.grid("budget", *["made again"] * again, "kept", "lost", "risk is at most", "certified")
    for row in result["curve"]:
        stopped = row["asked"] < row["questions"]
        lost = f"{row['lost']} of {row['asked']}" + ", stopped" * stopped
        bound = "" if stopped else f"{percent(row['bound'], 2)}%"
        passed = "yes" if row["certified"] else "no"
        made_again = [f"{row.get('escalated', 0)} of {row['asked']}"] * again
        table.add_row(row["label"], *made_again, f"{row['kept_fraction']:.1%}", lost, bound, passed)
    console.print_rich(table)
    if result["chosen"] is not None:
        typer.echo(f"chosen: {result['chosen']['label']}")
