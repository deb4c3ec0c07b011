"""The rows of a batch job: a file of questions, or a folder of pictures and one question for all."""

from __future__ import annotations

import bisect
import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from crosstrim.data import sources
from crosstrim.errors import DatasetError, InputError

PICTURES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of the files that are taken from a folder."""


@dataclass(frozen=True)
class Row:
    """One question about one picture or several, or why it cannot be asked.

    Attributes:
        id: the row's own, or the number of its line or Parquet row from 1, blank lines counted; of a folder, the
            picture's path in it. No two rows share one.
        question: what to ask.
        sources: the pictures, undecoded, in the order in which the prompt opens with them.
        error: why the row cannot be asked; then the others mean nothing.
    """

    id: str
    question: str = ""
    sources: tuple[sources.Source, ...] = field(default=(), repr=False)
    error: str | None = None


class Rows(Protocol):
    """What a job reads: every row has a place, from 0, and any rows can be read again after a kill."""

    @property
    def sha256(self) -> str:
        """Changes with any row, but not with a picture that a row only names."""

    @property
    def passed_over(self) -> str | None:
        """What was not taken for a row, in words for a person; None where that is nothing."""

    def __len__(self) -> int: ...

    def read(self, places: range) -> list[Row]:
        """Read the rows at these places."""


def open_rows(path: Path, question: str | None = None) -> Rows:
    """The rows of a .jsonl or .parquet file, or of a folder of pictures.

    Args:
        path: of the file or folder.
        question: asked of every picture whose row has no `question` of its own; a folder needs it.

    Raises:
        DatasetError: there are no such rows, they cannot be read, or two have the same id.
        MissingExtraError: the file is Parquet and pyarrow is not installed.
    """
    rows: Rows
    path = path.absolute()
    what = "row to ask"
    if path.is_dir():
        if question is None:
            raise DatasetError(f"{path} is a folder of pictures; say with --question what to ask of each.")
        rows, what = _FolderRows(path, question), "picture"
    elif path.suffix.lower() == ".jsonl":
        rows = _JsonlRows(path, question)
    elif path.suffix.lower() == ".parquet":
        rows = _ParquetRows(path, question)
    elif path.exists():
        raise DatasetError(f"{path} is no folder and ends in neither .jsonl nor .parquet.")
    else:
        raise DatasetError(f"there is no file or folder {path}; check the path.")
    if not len(rows):
        raise DatasetError(f"{path} holds no {what}.")
    return rows


class _FolderRows:
    def __init__(self, folder: Path, question: str) -> None:
        self._folder, self._question = folder, question
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self._names = [name for name in files if _is_picture(name)]
        others = [name for name in files if not _is_picture(name) and not name.rpartition("/")[2].startswith(".")]
        self.passed_over = _passed_over(others) if others else None
        self._refuse_same_ids()

    def _refuse_same_ids(self) -> None:
        """Names that are not UTF-8 are written otherwise, perhaps as another file is called."""
        ids, seen = map(_spelt, self._names), set[str]()
        for identity in ids:
            if identity in seen:
                raise DatasetError(f"{self._folder} holds two pictures whose id is {identity!r}; rename one of them.")
            seen.add(identity)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def sha256(self) -> str:
        sizes = (f"{name}\0{(self._folder / name).stat().st_size}\n" for name in self._names)
        return hashlib.sha256(os.fsencode("".join(sizes))).hexdigest()

    def read(self, places: range) -> list[Row]:
        names = [self._names[place] for place in places]
        return [_row(name, {"image": name, "id": _spelt(name)}, self._folder, self._question) for name in names]


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURES


def _spelt(name: str) -> str:
    """The name of a file as UTF-8 can hold it; other bytes are written as a backslash, x and their two digits."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _passed_over(names: Sequence[str]) -> str:
    examples = ", ".join(map(_spelt, names[:3])) + (", ..." if len(names) > 3 else "")
    count = "1 file that is" if len(names) == 1 else f"{len(names)} files that are"
    endings = ", ".join(sorted(PICTURES))
    return f"passed over {count} no picture by the ending ({examples}); taken are {endings}. Convert what is one."


class _JsonlRows:
    passed_over = None

    def __init__(self, path: Path, question: str | None) -> None:
        self._path, self._question = path, question
        self._numbers, self._begins, ids = array("Q"), array("Q"), _Ids(path, "lines")
        for number, begins, line in sources.jsonl_lines(path):
            self._numbers.append(number)
            self._begins.append(begins)
            ids.add(number, _line_id(str(number), line))

    def __len__(self) -> int:
        return len(self._begins)

    @property
    def sha256(self) -> str:
        return _hash(self._path)

    def read(self, places: range) -> list[Row]:
        try:
            with self._path.open("rb") as file:
                return [self._read(file, place) for place in places]
        except OSError as error:
            raise DatasetError(f"{self._path} cannot be read: {error.strerror}.") from error

    def _read(self, file: BinaryIO, place: int) -> Row:
        file.seek(self._begins[place])
        number, line = str(self._numbers[place]), file.readline()
        try:
            return _row(number, sources.parse_line(line), self._path.parent, self._question)
        except InputError as error:
            return Row(number, error=str(error))


class _ParquetRows:
    passed_over = None

    def __init__(self, path: Path, question: str | None) -> None:
        self._path, self._question = path, question
        required = ("image",) if question is not None else ("image", "question")
        with sources.open_parquet(path, required) as file:
            self._columns = [name for name in ("id", "image", "question") if name in file.schema_arrow.names]
            groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            if "id" in self._columns:
                ids = _Ids(path, "rows")
                column = (value for part in file.iter_batches(columns=["id"]) for value in part["id"].to_pylist())
                for number, given in enumerate(column, 1):
                    ids.add(number, _id(str(number), given))
        self._ends = [sum(groups[: index + 1]) for index in range(len(groups))]
        self._held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def sha256(self) -> str:
        return _hash(self._path)

    def read(self, places: range) -> list[Row]:
        rows = []
        for place in places:
            group = bisect.bisect_right(self._ends, place)
            table, begins = self._group(group), self._ends[group - 1] if group else 0
            (values,) = table.slice(place - begins, 1).to_pylist()
            rows.append(_row(str(place + 1), values, self._path.parent, self._question))
        return rows

    def _group(self, group: int) -> Any:
        """A row group, of which the latest stays in memory: rows are mostly read in order."""
        if self._held[0] != group:
            self._held = (-1, None)
            with sources.open_parquet(self._path, self._columns) as file:
                self._held = (group, file.read_row_group(group, columns=self._columns))
        return self._held[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": (-1, None)}


class _Ids:
    """The ids of a file's rows, of which every two must differ: answers are told apart by them alone."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._numbers: dict[str, int] = {}

    def add(self, number: int, identity: str) -> None:
        first = self._numbers.setdefault(identity, number)
        if first != number:
            raise DatasetError(
                f"{self._path}: the {self._what} {first} and {number} both have the id {identity!r} (without one, a "
                "row has its number for an id); give every row an id of its own, or leave all ids out."
            )


def _line_id(number: str, line: bytes) -> str:
    try:
        values = sources.parse_line(line)
    except InputError:
        return number  # the row says what is wrong when it is read
    return _id(number, values.get("id") if isinstance(values, dict) else None)


def _id(number: str, given: Any) -> str:
    return number if given is None else writable(str(given))


def batches(count: int, size: int, done: Iterable[range] = ()) -> Sequence[range]:
    """The places of `count` rows but those that are done, in order and in batches of at most `size`."""
    found: list[range] = []
    begins = 0
    for span in [*sorted(done, key=lambda span: span.start), range(count, count)]:
        found += (range(start, min(start + size, span.start)) for start in range(begins, span.start, size))
        begins = span.stop
    return found


def _row(number: str, values: Any, folder: Path, question: str | None) -> Row:
    if not isinstance(values, dict):
        return Row(number, error=f"expected an object with image and question, got {sources.type_name(values)}.")
    identity = _id(number, values.get("id"))
    asked = question if values.get("question") is None else values["question"]
    if not isinstance(asked, str) or not asked.strip():
        return Row(identity, error=f"'question' must be a text that is not empty, got {asked!r}.")
    if writable(asked) != asked:
        return Row(identity, error="the question holds half a character (a lone surrogate).")
    if sources.IMAGE_TOKEN in asked:
        return Row(identity, error=f"the question contains {sources.IMAGE_TOKEN}, which stands for the picture.")
    try:
        return Row(identity, asked, sources.picture_sources(values.get("image"), folder))
    except InputError as error:
        return Row(identity, error=str(error))


def writable(text: str) -> str:
    """The text as UTF-8 can hold it; JSON and the names of files may hold halves of characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error
