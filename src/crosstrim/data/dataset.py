"""Questions about pictures from JSONL, Parquet or the embedded benchmark, every row checked before any is asked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from PIL import Image

from crosstrim import mini
from crosstrim.asking.images import read as read_picture
from crosstrim.data import sources
from crosstrim.errors import DatasetError, InputError

REQUIRED = ("image", "question", "answers")
OPTIONAL = ("id", "kind")
ALL = "all"
"""The kind of every question when a file has no column `kind`."""

ON_ERROR = ("stop", "skip")
"""What may happen when rows cannot be asked."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unlike every other's.
        source: the picture: a path, or the bytes of its file.
        picture: SHA-256 of the picture's file, by which questions about the same picture find each other.
        question: what to ask.
        answers: any of them is right.
        kind: what to report it under.
    """

    id: str
    source: sources.Source = field(repr=False)
    picture: str
    question: str
    answers: tuple[str, ...]
    kind: str

    def open(self) -> Image.Image:
        """The picture, decoded."""
        return sources.open_source(self.source)


@dataclass(frozen=True)
class Problem:
    """A row that cannot be asked.

    Attributes:
        row: its number, from 1; of a JSONL file, the line's.
        words: what is wrong with it.
    """

    row: int
    words: str


@dataclass(frozen=True)
class Dataset:
    """Checked questions, those about one picture next to each other.

    Attributes:
        name: where they come from.
        unit: what its rows are called: "line" or "row".
        items: those that can be asked.
        problems: the rows that cannot.
    """

    name: str
    unit: str
    items: tuple[Item, ...]
    problems: tuple[Problem, ...] = ()

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
    checks = _Checks(Path(), "line")
    items = [checks.item(number, row) for number, row in enumerate(mini.select(mini.heldout(), quick), 1)]
    return Dataset("mini-heldout", "line", _together(items))


def single(source: str, question: str) -> Dataset:
    """One question about one picture, without an answer.

    Args:
        source: as of `crosstrim.images.open_image`.
        question: what to ask.

    Raises:
        InputError: the picture or the question cannot be used.
    """
    row = {"image": {"bytes": read_picture(source)}, "question": question, "answers": "?"}
    return Dataset(source, "line", (replace(_Checks(Path(), "line").item(1, row), answers=()),))


def read(path: Path, progress: Progress = lambda row: None) -> Dataset:
    """Read and check a file of questions, decoding every picture once.

    Args:
        path: a .jsonl or .parquet file, with the columns `image`, `question` and `answers`, and perhaps `id` and
            `kind`; others are ignored. Paths of pictures count from the file's folder.
        progress: called with the number of each row that was checked.

    Returns:
        The dataset, with a problem for every row that cannot be asked.

    Raises:
        DatasetError: the file as a whole cannot be read.
        MissingExtraError: it is Parquet and pyarrow is not installed.
    """
    rows: Iterator[tuple[int, Any]]
    if path.suffix.lower() == ".jsonl":
        unit, rows = "line", ((number, line) for number, _, line in sources.jsonl_lines(path))
    elif path.suffix.lower() == ".parquet":
        unit, rows = "row", _parquet_rows(path)
    else:
        raise DatasetError(f"{path} ends in {path.suffix!r}; questions are read from .jsonl and .parquet.")
    checks, items, problems = _Checks(path.parent, unit), [], []
    for number, row in rows:
        try:
            items.append(checks.item(number, sources.parse_line(row) if isinstance(row, bytes) else row))
        except InputError as error:
            problems.append(Problem(number, str(error)))
        progress(number)
    return Dataset(str(path), unit, _together(items), tuple(problems))


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with sources.open_parquet(path, REQUIRED) as file:
        columns = [name for name in (*REQUIRED, *OPTIONAL) if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _together(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items, those about one picture next to each other, otherwise in their order."""
    by_picture: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_picture[item.picture].append(item)
    return tuple(item for group in by_picture.values() for item in group)


class _Checks:
    """Turns rows into items, and remembers what rows must agree on.

    Args:
        folder: where relative paths of pictures begin.
        unit: what a row is called.
    """

    def __init__(self, folder: Path, unit: str) -> None:
        self._folder = folder.absolute()
        self._unit = unit
        self._rows_of_ids: dict[str, int] = {}
        self._types: tuple[int, dict[str, str]] | None = None
        self._pictures: dict[str | bytes, str | InputError] = {}

    def item(self, number: int, row: Any) -> Item:
        """The row as an item.

        Raises:
            InputError: it cannot be asked.
        """
        if not isinstance(row, dict):
            raise InputError(f"expected an object with {', '.join(REQUIRED)}, got {sources.type_name(row)}.")
        row = {name: row[name] for name in (*REQUIRED, *OPTIONAL) if row.get(name) is not None}
        self._check_columns(number, row)
        identity = self._id(number, row)
        question, kind = row["question"], row.get("kind", ALL)
        for name, text in (("question", question), ("kind", kind)):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{name!r} must be a text that is not empty, got {text!r}.")
        if sources.IMAGE_TOKEN in question:
            raise InputError(f"the question contains {sources.IMAGE_TOKEN}, which stands for the picture.")
        source = sources.picture_source(row["image"], self._folder)
        return Item(identity, source, self._checked(source), question, _answers(row["answers"]), kind)

    def _check_columns(self, number: int, row: dict[str, Any]) -> None:
        missing = [name for name in REQUIRED if name not in row]
        if missing:
            raise InputError(f"{missing[0]!r} is missing; every row needs {', '.join(REQUIRED)}.")
        types = {name: sources.type_name(value) for name, value in row.items()}
        if self._types is None:
            self._types = number, types
        first, expected = self._types
        for name in (*REQUIRED, *OPTIONAL):
            here, there = types.get(name, "missing"), expected.get(name, "missing")
            if here != there:
                raise InputError(f"{name!r} is {here}, but {there} in {self._unit} {first}; rows must be alike.")

    def _id(self, number: int, row: dict[str, Any]) -> str:
        identity = str(row.get("id", number))
        other = self._rows_of_ids.setdefault(identity, number)
        if other != number:
            raise InputError(f"id {identity!r} is that of {self._unit} {other} already.")
        return identity

    def _checked(self, source: sources.Source) -> str:
        """SHA-256 of a picture that can be decoded."""
        key = hashlib.sha256(source).digest() if isinstance(source, bytes) else source
        if key not in self._pictures:
            try:
                sources.open_source(source)
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
