"""`crosstrim analyze`: the paper's observations, sparse attention, layers that agree, and KV bytes, on your model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosstrim.cli import console, eval_options, options
from crosstrim.eval import defaults
from crosstrim.memory import SHAPES

if TYPE_CHECKING:
    from crosstrim.data.dataset import Dataset


def analyze(
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE",
            help="A picture, - for stdin, an example (see: crosstrim examples), or a folder of pictures.",
        ),
    ] = None,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="What to ask about it.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Read the questions of a .jsonl or .parquet file."),
    ] = None,
    on_error: eval_options.OnError = "stop",
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions",
            metavar="COUNT",
            min=1,
            help=f"How many questions to read, from the first on. Default: {defaults.QUESTIONS}.",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="|".join(SHAPES),
            help="Load nothing: compute the KV bytes of that Llama-3.2-Vision from its shape.",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FOLDER", help="Write analysis.json, analysis.md and figures to this folder."),
    ] = None,
    batch_size: eval_options.BatchSize = 32,
    model: options.Model = "mini",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    json: options.Json = False,
) -> None:
    """Show how sparse a model's cross-attention is, how far its layers agree, and what its KV cache holds.

    Reads prompts with the untrimmed model: one question about one picture or a folder of them, those of --data, or
    the first of the embedded mini's held-out questions. Answers are neither needed nor given.

    Try: crosstrim analyze example "Read all the digits."
    """
    from crosstrim.data import pages
    from crosstrim.eval import analysis, analysis_page

    sources = {"IMAGE": image, "--data": data, "--shape": shape}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} are two things to look at; give one of them.")
    one = given == ["IMAGE"] and not Path(str(image)).is_dir()
    if (one or given == ["--shape"]) and questions is not None:
        raise typer.BadParameter(f"--questions goes with --data or the embedded questions, not with {given[0]}.")
    if shape is not None and shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape} must be one of {', '.join(SHAPES)}.")
    asked = _asked(image, question, data, on_error, questions) if shape is None else None
    if to is not None:
        pages.prepare(to)
    if asked is None:
        result = analysis.of_shape(SHAPES[str(shape)])
    else:
        loaded, processor = options.load_model(model, dtype, device, quantize)
        with console.progress("questions") as steps:
            result = analysis.run(loaded, processor, asked, name=model, batch_size=batch_size, progress=steps)
    if to is not None:
        for file in analysis_page.write(result, to):
            console.say(f"wrote {file}")
    if json:
        console.print_json(result)
    else:
        _print(result)


def _asked(
    image: str | None, question: str | None, data: Path | None, on_error: str, questions: int | None
) -> Dataset:
    """What to read, cut to as many questions as are wanted."""
    from crosstrim.asking import images
    from crosstrim.data import dataset

    if image is not None and question is None:
        raise typer.BadParameter("IMAGE goes with a QUESTION: attention is what the text pays to the picture.")
    if image is not None and not Path(image).is_dir():
        return dataset.single(images.find(image), str(question))
    if data is not None and data.is_dir():
        raise typer.BadParameter(f"--data {data} is a folder; give it as IMAGE, with a QUESTION.")
    source = data if image is None else Path(image)
    found = eval_options.questions(source, on_error, question=question, labelled=False)
    count = len(found.items)
    if source is not None and questions is None and count > defaults.QUESTIONS:
        console.say(f"reads the first {defaults.QUESTIONS} of {count} questions; --questions {count} reads all.")
    return found.first(questions or defaults.QUESTIONS)


def _print(result: Mapping[str, Any]) -> None:
    from crosstrim.eval import analysis_page

    if "dataset" in result:
        console.print_rich(f"questions read: {result['dataset']['questions']} of {result['dataset']['name']}", "")
    console.print_tables(analysis_page.tables(result))
