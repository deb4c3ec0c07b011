"""Questions for evaluation, from files or the embedded benchmark, every row checked before any is asked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from PIL import Image

from crosstrim import mini
from crosstrim.asking.images import read as read_picture
from crosstrim.data.questions import NEEDED, Question, open_questions, question_of, text_of, type_name
from crosstrim.data.sources import Source, open_source
from crosstrim.errors import DatasetError, InputError

ALIKE = ("answers", "kind", "id")
"""Columns that every row must have, or none, with values of one type."""

ALL = "all"
"""The kind of every question when a file has no column `kind`."""

ON_ERROR = ("stop", "skip")
"""What may happen when rows cannot be asked."""

Progress = Callable[[int], None]

_AT_ONCE = 64  # rows that are read together


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unlike every other's.
        source: the picture: a path, or the bytes of its file.
        picture: SHA-256 of the picture's file, by which questions about the same picture find each other.
        question: what to ask.
        answers: any of them is right; empty where none was given.
        kind: what to report it under.
    """

    id: str
    source: Source = field(repr=False)
    picture: str
    question: str
    answers: tuple[str, ...]
    kind: str

    def open(self) -> Image.Image:
        """The picture, decoded."""
        return open_source(self.source)


@dataclass(frozen=True)
class Problem:
    """A row that cannot be asked.

    Attributes:
        row: its number, as of `Question`.
        words: what is wrong with it.
    """

    row: int
    words: str


@dataclass(frozen=True)
class Dataset:
    """Checked questions, those about one picture next to each other.

    Attributes:
        name: where they come from.
        unit: what its rows are called, as of `Questions`.
        items: those that can be asked.
        problems: the rows that cannot.
        passed_over: as of `Questions`.
    """

    name: str
    unit: str
    items: tuple[Item, ...]
    problems: tuple[Problem, ...] = ()
    passed_over: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Changes with any question, answer or picture."""
        rows = [[one.id, one.picture, one.question, one.answers, one.kind] for one in self.items]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def kinds(self) -> dict[str, int]:
        """Questions of each kind."""
        return dict(Counter(item.kind for item in self.items))

    def complaints(self) -> list[str]:
        """One line per row that cannot be asked."""
        return [f"{self.name}, {self.unit} {problem.row}: {problem.words}" for problem in self.problems]

    def usable(self, on_error: str) -> Dataset:
        """This dataset, unless rows cannot be asked and that is to stop the run, or none is left.

        Args:
            on_error: "stop", or "skip" to go on without those rows (`ON_ERROR`).

        Raises:
            DatasetError: it names their numbers.
        """
        if self.problems and on_error == "stop":
            numbers = [problem.row for problem in self.problems]
            shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
            raise DatasetError(
                f"{len(numbers)} of {len(numbers) + len(self.items)} rows of {self.name} cannot be asked "
                f"({self.unit} {shown}); repair them, or go on without them by --on-error skip. Nothing was run."
            )
        if not self.items:
            raise DatasetError(f"{self.name} holds no question that can be asked.")
        return self

    def first(self, count: int) -> Dataset:
        """At most `count` questions."""
        return replace(self, items=self.items[:count])

    def first_of_each_kind(self, count: int) -> Dataset:
        """At most `count` questions of each kind."""
        taken: Counter[str] = Counter()
        chosen = []
        for item in self.items:
            taken[item.kind] += 1
            if taken[item.kind] <= count:
                chosen.append(item)
        return replace(self, items=tuple(chosen))


def embedded(quick: bool = False) -> Dataset:
    """The embedded model's held-out questions, or the first few of each kind and tile layout."""
    checks, rows = _Checks("line"), enumerate(mini.select(mini.heldout(), quick), 1)
    return Dataset("mini-heldout", "line", _together([checks.item(question_of(*row, Path())) for row in rows]))


def single(source: str, question: str) -> Dataset:
    """One question about one picture, without an answer.

    Args:
        source: as of `crosstrim.asking.images.open_image`.
        question: what to ask.

    Raises:
        InputError: the picture or the question cannot be used.
    """
    row = {"image": {"bytes": read_picture(source)}, "question": question}
    return Dataset(source, "line", (_Checks("line").item(question_of(1, row, Path())),))


def read(
    path: Path, question: str | None = None, *, labelled: bool = True, progress: Progress = lambda row: None
) -> Dataset:
    """Read and check questions, decoding every picture once.

    Args:
        path: as of `open_questions`; a file has the columns `image`, `question` and `answers`, and perhaps `id` and
            `kind`.
        question: as of `open_questions`.
        labelled: whether every row needs `answers`; where not, a row may have none, and a folder has none.
        progress: called with the number of each row that was checked.

    Returns:
        The dataset, with a problem for every row that cannot be asked.

    Raises:
        DatasetError: the file as a whole cannot be read.
        MissingExtraError: it is Parquet and pyarrow is not installed.
    """
    rows = open_questions(path, question, (*NEEDED, *["answers"] * labelled), strict=False)
    checks, items, problems = _Checks(rows.unit), [], []
    for begins in range(0, len(rows), _AT_ONCE):
        for row in rows.read(range(begins, min(begins + _AT_ONCE, len(rows)))):
            try:
                items.append(checks.item(row, rows.doubled.get(row.number)))
            except InputError as error:
                problems.append(Problem(row.number, str(error)))
            progress(row.number)
    return Dataset(str(path), rows.unit, _together(items), tuple(problems), rows.passed_over)


def _together(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items, those about one picture next to each other, otherwise in their order."""
    by_picture: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_picture[item.picture].append(item)
    return tuple(item for group in by_picture.values() for item in group)


class _Checks:
    """Turns rows into items, and remembers what rows must agree on.

    Args:
        unit: what a row is called.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._first: Question | None = None
        self._pictures: dict[str | bytes, str | InputError] = {}

    def item(self, row: Question, doubled: tuple[int, str] | None = None) -> Item:
        """The row as an item.

        Args:
            row: to check.
            doubled: the number of the row that has its id already, and the id.

        Raises:
            InputError: it cannot be asked.
        """
        if row.error is not None:
            raise InputError(row.error)
        self._check_alike(row)
        if doubled is not None:
            raise InputError(f"id {row.id!r} is that of {self._unit} {doubled[0]} already.")
        if len(row.sources) > 1:
            raise InputError(f"'image' lists {len(row.sources)} pictures; here a question is about one.")
        kind = text_of("kind", row.given.get("kind", ALL))
        answers = _answers(row.given["answers"]) if "answers" in row.given else ()
        return Item(row.id, row.sources[0], self._checked(row.sources[0]), row.question, answers, kind)

    def _check_alike(self, row: Question) -> None:
        self._first = self._first or row
        for name in ALIKE:
            here, there = (
                type_name(one.given[name]) if name in one.given else "missing" for one in (row, self._first)
            )
            if here != there:
                raise InputError(
                    f"{name!r} is {here}, but {there} in {self._unit} {self._first.number}; rows must be alike."
                )

    def _checked(self, source: Source) -> str:
        """SHA-256 of a picture that can be decoded."""
        key = hashlib.sha256(source).digest() if isinstance(source, bytes) else source
        if key not in self._pictures:
            try:
                open_source(source)
                content = source if isinstance(source, bytes) else Path(source).read_bytes()
                self._pictures[key] = hashlib.sha256(content).hexdigest()
            except InputError as error:
                self._pictures[key] = error
        known = self._pictures[key]
        if isinstance(known, InputError):
            raise InputError(str(known))
        return known


def _answers(value: Any) -> tuple[str, ...]:
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not all(isinstance(one, str) for one in answers):
        raise InputError(f"'answers' must be a text or a list of texts, got {value!r}.")
    if not answers or not all(one.strip() for one in answers):
        raise InputError(f"an answer is empty: {value!r}; every question needs at least one, and none empty.")
    return tuple(cast(list[str], answers))
