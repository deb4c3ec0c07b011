"""`crosstrim batch`: a file of questions, or a folder of pictures, to a file of answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from crosstrim.cli import console, options
from crosstrim.data.journal import journal_of
from crosstrim.wording import counted


@options.with_trim
def batch(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A .jsonl or .parquet file, or a folder of pictures.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A .jsonl or .parquet file of answers.")],
    question: Annotated[
        str | None,
        typer.Option("--question", metavar="TEXT", help="What to ask where INPUT has no question of its own."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where a run was cut off; what is done is not done again, rows that failed included. "
            "--batch-size may be another.",
        ),
    ] = False,
    *,
    trim: options.Trim,
    escalate: options.Escalate = None,
    escalate_to: options.EscalateTo = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", metavar="COUNT", min=1, help="Rows written together; fewer are asked at once if need be."
        ),
    ] = 32,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            metavar="GIB",
            min=0.001,
            help="What a batch may take beside the weights. Default: half of what the GPU has left; 4 on the CPU.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="COUNT", min=1, help="Where to cut answers off.")
    ] = 64,
    engine: Annotated[
        str,
        typer.Option("--engine", metavar="auto|local|ray", help="auto is ray where --address is given, else local."),
    ] = "auto",
    address: Annotated[
        str | None, typer.Option("--address", metavar="ADDRESS", help="Of a running Ray cluster.")
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="COUNT", min=1, help="Models at work at once; with --engine ray.")
    ] = 1,
    model: options.Model = "mini",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    json: options.Json = False,
) -> None:
    """Ask a file of questions, or one question about a folder of pictures.

    OUTPUT has a row for every row of INPUT, in its order: id, answer, visible, kept, kept_fraction and error; with
    --escalate also attempts. A row that cannot be asked has an error and no answer, and the others go on. After a
    kill, --resume goes on.
    """
    from crosstrim.asking import environment
    from crosstrim.batch import ray as ray_batch
    from crosstrim.batch import run as jobs
    from crosstrim.batch.answerer import Job, answer_here
    from crosstrim.data.questions import open_questions

    if engine not in ("auto", "local", "ray"):
        raise typer.BadParameter(f"--engine {engine} must be one of auto, local, ray.")
    on_ray = engine == "ray" or (engine == "auto" and address is not None)
    if not on_ray and (address is not None or workers != 1):
        raise typer.BadParameter("--address and --workers go with --engine ray.")
    if on_ray:
        ray_batch.import_ray("ray.data")
    jobs.check_path(out)
    trim, escalation = options.attempts(trim, escalate, escalate_to)
    rows = open_questions(source, question)
    if rows.passed_over is not None:
        console.say(rows.passed_over)
    job = Job(
        rows=rows,
        model=model,
        dtype=dtype,
        quantization=quantize,
        device=device or (None if on_ray else environment.best_device()),
        config=trim,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        memory=None if memory is None else int(memory * 2**30),
        escalation=escalation,
    )
    run = partial(ray_batch.answer_on_ray, address=address, workers=workers) if on_ray else answer_here
    was_there = out.exists()
    with console.resumable(journal_of(out), "the same command with --resume"), console.progress("rows") as steps:
        found = jobs.run(job, out, run, source=str(source), question=question, resume=resume, progress=steps)
    if found["failed"]:
        console.say(f"{found['failed']} of {counted(found['rows'], 'row')} failed; their column 'error' says why.")
    console.say_written(out, was_there)
    if json:
        console.print_json(found)
    else:
        typer.echo(f"{found['answered']} of {counted(found['rows'], 'row')} answered")
