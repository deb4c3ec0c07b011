"""Answers rows with a loaded model, as many at once as fit; a row that fails is told and the others go on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from crosstrim.asking import answering
from crosstrim.asking.batches import Encoder
from crosstrim.asking.escalation import Escalation, Settled
from crosstrim.asking.loading import load
from crosstrim.config import TrimConfig
from crosstrim.data import sources
from crosstrim.data.questions import Question, Questions, writable
from crosstrim.errors import CrosstrimError, InputError
from crosstrim.models.memory import bytes_per_sample
from crosstrim.trimming.checks import check_calibrated

PROMPT_TOKENS = 512
"""Of a question, where memory is planned."""

CPU_BYTES = 4 << 30
"""For the questions of a batch, where no number is given and the model is on the CPU."""

_Sample = tuple[Question, list[Image.Image]]

Answered = dict[str, Any]
"""id, answer, visible, kept, kept_fraction and error, and attempts where answers are made again; plain JSON types."""


@dataclass(frozen=True)
class Job:
    """What every worker of a batch job needs to know.

    Attributes:
        rows: what to ask.
        model: as `crosstrim.load` takes it.
        dtype: likewise.
        device: likewise, by the name `device_map`.
        config: how to trim.
        max_new_tokens: where to cut answers off.
        batch_size: rows that are answered and written together.
        memory: bytes that the questions of a batch may take beside the weights; None is half of what the GPU has
            left, or 4 GiB on the CPU.
        done: places of rows that an earlier run answered, which are in no batch.
        escalation: when answers are made again.
        quantization: as `crosstrim.load` takes it.
    """

    rows: Questions
    model: str
    dtype: str | None
    device: str | None
    config: TrimConfig
    max_new_tokens: int
    batch_size: int
    memory: int | None = None
    done: tuple[range, ...] = ()
    escalation: Escalation | None = None
    quantization: str | None = None

    @cached_property
    def batches(self) -> Sequence[range]:
        """The places of the rows of each batch."""
        return batches(len(self.rows), self.batch_size, self.done)


class Answerer:
    """One loaded model, at work on a job.

    Args:
        job: whose model to load.

    Raises:
        CrosstrimError: the model cannot be loaded, or is not the one that the config was calibrated with.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model, self._processor = load(
            job.model, dtype=job.dtype, device_map=job.device, quantization=job.quantization
        )
        check_calibrated(self._model, job.config)
        self._encoder = Encoder(self._model, self._processor)
        memory = _free_bytes(self._model.device) if job.memory is None else job.memory
        self.at_once = max(1, memory // bytes_per_sample(self._model, PROMPT_TOKENS + job.max_new_tokens))

    def answer(self, batch: int) -> list[Answered]:
        """The answers, in order, to the rows of the job's batch of this number."""
        rows = self._job.rows.read(self._job.batches[batch])
        answers: list[Answered] = [_failed(row, row.error or "") for row in rows]
        askable: dict[int, list[int]] = defaultdict(list)  # places, by the number of pictures
        for place, row in enumerate(rows):
            if row.error is None:
                try:
                    images, limit = len(row.sources), self._job.max_new_tokens
                    answering.check_question(self._model, self._processor, row.question, limit, images)
                    askable[images].append(place)
                except InputError as error:
                    answers[place] = _failed(row, str(error))
        for images, places in askable.items():
            for part in batches(len(places), max(1, self.at_once // images)):
                chosen = places[part.start : part.stop]
                for place, answered in zip(chosen, self._open_and_ask([rows[one] for one in chosen]), strict=True):
                    answers[place] = answered
        return answers

    def _open_and_ask(self, rows: Sequence[Question]) -> list[Answered]:
        """Ask rows with as many pictures each together, except those whose pictures cannot be opened."""
        failed: dict[int, Answered] = {}
        samples: list[_Sample] = []
        for place, row in enumerate(rows):
            try:
                samples.append((row, sources.open_sources(row.sources)))
            except InputError as error:
                failed[place] = _failed(row, str(error))
        answers = iter(self._ask(samples) if samples else ())
        return [failed[place] if place in failed else next(answers) for place in range(len(rows))]

    def _ask(self, samples: Sequence[_Sample]) -> list[Answered]:
        """Ask together; what fails together is halved until the row that fails is alone."""
        try:
            return self._ask_together(samples)
        except (CrosstrimError, RuntimeError, ValueError) as error:
            failure = _words(error)
        # Outside of the handler, so that the traceback no longer holds the failed attempt's memory.
        if len(samples) == 1:
            return [_failed(samples[0][0], failure)]
        middle = len(samples) // 2
        return self._ask(samples[:middle]) + self._ask(samples[middle:])

    def _ask_together(self, samples: Sequence[_Sample]) -> list[Answered]:
        pictures, questions = [pictures for _, pictures in samples], [row.question for row, _ in samples]
        config, escalation, limit = self._job.config, self._job.escalation, self._job.max_new_tokens
        with self._encoder.asked(pictures, questions, limit) as inputs:
            found = answering.settle(self._model, self._processor, inputs, config, escalation, limit)
        return [_answered(row, one) for (row, _), one in zip(samples, found, strict=True)]


def batches(count: int, size: int, done: Iterable[range] = ()) -> Sequence[range]:
    """The places of `count` rows but those that are done, in order and in batches of at most `size`."""
    found: list[range] = []
    begins = 0
    for span in [*sorted(done, key=lambda span: span.start), range(count, count)]:
        found += (range(start, min(start + size, span.start)) for start in range(begins, span.start, size))
        begins = span.stop
    return found


def answer_here(job: Job, pending: Sequence[int]) -> Iterator[tuple[int, list[Answered]]]:
    """Answer batches in this process, one after the other: their numbers and their rows' answers."""
    answerer = Answerer(job)
    for batch in pending:
        yield batch, answerer.answer(batch)


def _answered(row: Question, one: Settled) -> Answered:
    if one.attempts:
        visible, kept = one.attempts[-1].visible, one.attempts[-1].kept
        fraction = kept / visible
    else:
        visible, kept = (sum(getattr(image, name) for image in one.images) for name in ("visible", "kept"))
        fraction = answering.kept_fraction(one.images)
    answered = {"id": row.id, "answer": one.text, "visible": visible, "kept": kept}
    answered |= {"kept_fraction": round(fraction, 6), "error": None}
    # Without their times, so that the same job gives the same file.
    attempts = [tried.to_dict() for tried in one.attempts]
    for tried in attempts:
        del tried["seconds"]
    return answered | ({"attempts": attempts} if attempts else {})


def _failed(row: Question, error: str) -> Answered:
    return {
        "id": row.id,
        "answer": None,
        "visible": None,
        "kept": None,
        "kept_fraction": None,
        "error": writable(error),
    }


def _words(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the device ran out of memory on this row alone; take a smaller dtype or a larger device."
    lines = str(error).strip().splitlines() or [""]
    return " ".join(lines) if isinstance(error, CrosstrimError) else f"{type(error).__name__}: {lines[0]}"


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_BYTES
