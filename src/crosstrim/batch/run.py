"""A batch job: rows in, answers out in the same order, in a run that can be killed and goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosstrim.batch.answerer import Answered, Job
from crosstrim.data.journal import Journal, Record, check_same, journal_of
from crosstrim.errors import MissingExtraError, ResultError
from crosstrim.files import write_json, written_whole
from crosstrim.trimming.report import versions

FORMAT = 2
_ROWS_PER_GROUP = 4096  # of Parquet

AnswerBatches = Callable[[Job, Sequence[int]], Iterator[tuple[int, list[Answered]]]]
"""An engine: answers the job's batches of these numbers, in any order."""

Progress = Callable[[int, int], None]


def run(
    job: Job,
    out: Path,
    engine: AnswerBatches,
    *,
    source: str,
    question: str | None = None,
    resume: bool = False,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Answer every row and write `out`.

    A batch that is answered is appended to a journal beside `out` and synced to the disk before it counts as done.
    When all are, `out` and `out`.run.json, which says what they were made with, are written, each whole or not at
    all, and the journal goes.

    Args:
        job: what to ask, of which model.
        out: a .jsonl or .parquet file.
        engine: answers batches.
        source: the name of what the rows were read from.
        question: what is asked where a row has no question.
        resume: whether to go on with what a killed run left.
        progress: called with how many rows are done, and of how many.

    Returns:
        How many rows were answered and how many failed, and the files.

    Raises:
        ResultError: `out` or a journal of it exists and `resume` is not given, or it belongs to another job, or
            it cannot be written.
        MissingExtraError: `out` is Parquet and pyarrow is not installed.
    """
    check_path(out)
    header, notes, journal_path = (
        _header(job, source, question),
        out.with_name(f"{out.name}.run.json"),
        journal_of(out),
    )
    if not resume:
        _refuse_leftovers(out, journal_path)
    if out.exists():
        summary = _read_notes(notes)
        check_same(summary, header, notes)
    else:
        with Journal(journal_path, header) as journal:
            try:
                _answer_rest(job, engine, journal, progress)
            finally:
                if not journal.records:  # a run that answered nothing leaves nothing to go on with
                    journal_path.unlink()
            records = journal.distinct(_rows_of)
        answers = [row for record in records for row in record["rows"]]
        failed = sum(row["error"] is not None for row in answers)
        sizes = sorted({record["batch_size"] for record in records})
        summary = {**header, "batch_sizes": sizes, "answered": len(answers) - failed, "failed": failed}
        write_json(notes, summary)
        _write(out, answers)
    journal_path.unlink(missing_ok=True)
    return {"rows": len(job.rows), **{name: summary[name] for name in ("answered", "failed")}, "out": str(out)}


def check_path(out: Path) -> None:
    """Refuse, before any work is done, a file that answers cannot be written to.

    Raises:
        ResultError: it is neither .jsonl nor .parquet, or its folder is not there.
        MissingExtraError: it is Parquet and pyarrow is not installed.
    """
    if out.suffix.lower() not in (".jsonl", ".parquet") or out.is_dir():
        raise ResultError(f"{out} cannot hold answers; give a file that ends in .jsonl or .parquet.")
    folder = Path(os.path.realpath(out)).parent  # where a link leads
    if not folder.is_dir():
        raise ResultError(f"{out} lies in a folder that does not exist; create {folder} first.")
    if out.suffix.lower() == ".parquet":
        _pyarrow(out)


def _refuse_leftovers(out: Path, journal: Path) -> None:
    for path, what in ((out, "exists"), (journal, "was left by a run that was cut off")):
        if path.exists():
            raise ResultError(f"{path} {what}; give --resume to go on with it, another output, or delete it.")


def _answer_rest(job: Job, engine: AnswerBatches, journal: Journal, progress: Progress) -> None:
    """Answer the rows that the journal does not hold yet, whatever the size of the batches that it holds."""
    records = journal.distinct(_rows_of)
    job = replace(job, done=tuple(range(record["first"], record["first"] + _rows_of(record)) for record in records))
    done = sum(map(len, job.done))
    progress(done, len(job.rows))
    if not job.batches:
        return
    with closing(engine(job, range(len(job.batches)))) as answered:  # type: ignore[type-var]
        for batch, rows in answered:
            journal.append({"first": job.batches[batch].start, "batch_size": job.batch_size, "rows": rows})
            done += len(rows)
            progress(done, len(job.rows))


def _rows_of(record: Record) -> int:
    return len(record["rows"])


def _header(job: Job, source: str, question: str | None) -> dict[str, Any]:
    """Everything the answers depend on; the device, the engine and the size of batches may change on the way."""
    return {
        "format": FORMAT,
        "input": {"name": source, "sha256": job.rows.sha256, "rows": len(job.rows)},
        "question": question,
        "model": {"name": job.model, "dtype": job.dtype, "quantization": job.quantization},
        "trim": job.config.to_dict(),
        "escalation": None if job.escalation is None else job.escalation.to_dict(),
        "generation": {"max_new_tokens": job.max_new_tokens, "do_sample": False},
        "versions": {name: version for name, version in versions("").items() if name != "device"},
    }


def _read_notes(path: Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ResultError(
            f"{path}, which says what the existing output was made with, cannot be read; give another output."
        ) from error
    return dict(notes)


def _write(out: Path, answers: Sequence[Answered]) -> None:
    """Write the answers, whole or not at all."""
    write = _write_parquet if out.suffix.lower() == ".parquet" else _write_jsonl
    with written_whole(out) as unfinished:
        write(unfinished, answers)


def _write_jsonl(path: Path, answers: Iterable[Answered]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in answers)


def _write_parquet(path: Path, answers: Sequence[Answered]) -> None:
    arrow = _pyarrow(path)
    types = {"id": arrow.string(), "answer": arrow.string(), "visible": arrow.int64(), "kept": arrow.int64()}
    types |= {"kept_fraction": arrow.float64(), "error": arrow.string()}
    if any("attempts" in row for row in answers):
        numbers = {"visible": arrow.int64(), "kept": arrow.int64(), "tokens": arrow.int64()}
        numbers |= {"lowest_probability": arrow.float64()}
        types["attempts"] = arrow.list_(arrow.struct(list({"budget": arrow.string(), **numbers}.items())))
    table = arrow.Table.from_pylist(list(answers), schema=arrow.schema(list(types.items())))
    arrow.parquet.write_table(table, path, row_group_size=_ROWS_PER_GROUP)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            f"writing {path} needs pyarrow, which is not installed: pip install 'crosstrim[eval]'."
        ) from error
    return arrow
