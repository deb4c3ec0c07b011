"""`crosstrim ask`: one question about one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from crosstrim.cli import console, options
from crosstrim.errors import InputError
from crosstrim.wording import counted

if TYPE_CHECKING:
    from crosstrim.asking.answering import Answer


@options.with_trim
def ask(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="A picture, - for stdin, or an example (see: crosstrim examples).")
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    *,
    trim: options.Trim,
    escalate: options.Escalate = None,
    escalate_to: options.EscalateTo = None,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the untrimmed model as well.")] = False,
    overlay: Annotated[
        Path | None,
        typer.Option("--overlay", metavar="FILE", help="Write the picture with dropped features greyed out."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="COUNT", min=1, help="Where to cut off.")
    ] = 64,
    model: options.Model = "mini",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    json: options.Json = False,
) -> None:
    """Ask a question about a picture, with its image features trimmed.

    Prints the answer, how many image features were kept, what their keys and values take in memory, and the time.

    Try: crosstrim ask example "Read all the digits." --compare
    """
    from crosstrim.asking import answering, images
    from crosstrim.asking import overlay as viz

    trim, escalation = options.attempts(trim, escalate, escalate_to)
    source = images.find(image)
    if overlay is not None:
        viz.check_path(overlay)
    picture = images.open_image(source)
    if overlay is not None:
        viz.check_size(picture.size)
    if overlay is not None and overlay.exists() and source != "-" and overlay.samefile(source):
        raise InputError(f"--overlay {overlay} is the picture itself; give another file.")
    loaded, processor = options.load_model(model, dtype, device, quantize)
    asking: dict[str, Any] = {"compare": compare, "max_new_tokens": max_new_tokens, "escalation": escalation}
    answer = answering.ask(loaded, processor, picture, question, trim, **asking)
    if overlay is not None and answer.report is not None:
        viz.save(viz.overlay_report(picture, answer.report, loaded, processor), overlay)
        console.say(f"wrote {overlay}")
    if json:
        console.print_json(answer.to_dict())
    else:
        _print(answer)


def _print(answer: Answer) -> None:
    from crosstrim.trimming.report import format_bytes

    report, untrimmed = answer.report, answer.untrimmed
    typer.echo(answer.answer if untrimmed is None else f"trimmed    {answer.answer}\nuntrimmed  {untrimmed.answer}")
    for attempt in answer.attempts:
        kept = f"kept {attempt.kept} of {counted(attempt.visible, 'visible feature')}"
        typer.echo(f"{attempt.budget}: {kept}, lowest token probability {attempt.lowest_probability:.2f}")
    if report is None:
        return
    table = Table.grid(padding=(0, 3))
    kept = f"{report.kept} of {report.visible} visible features ({report.kept_fraction:.1%})"
    rows = [
        ("kept", kept, f"all {sum(image.features for image in report.samples[0])}, padding included"),
        ("image KV", format_bytes(report.kv_bytes), format_bytes(report.kv_bytes_untrimmed)),
        ("time", _time(answer), _time(untrimmed) if untrimmed else "not run; see --compare"),
    ]
    table.add_row("", "trimmed", "untrimmed")
    for row in rows:
        table.add_row(*row)
    console.print_rich("", table)


def _time(answer: Answer) -> str:
    return f"{answer.seconds:.2f} s, {counted(answer.tokens, 'token')}"
