"""Questions about pictures from JSONL, Parquet, or a folder of pictures: one reader for all who ask them."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from crosstrim.data import sources
from crosstrim.errors import DatasetError, InputError, MissingExtraError

COLUMNS = ("id", "image", "question", "answers", "kind")
"""What is read of a row; other columns are ignored."""

NEEDED = ("image", "question")
"""What a row must have to be asked."""

IMAGE_TOKEN = "<|image|>"
"""Stands for the picture in every Llama-3.2-Vision prompt, so no question may contain it."""

PICTURES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of the files that are taken from a folder."""


@dataclass(frozen=True)
class Question:
    """One question about one picture or several, or why it cannot be asked.

    Attributes:
        number: of its row, from 1; of a JSONL file the line's, blank lines counted.
        id: the row's own, or its number; of a folder, the picture's path in it.
        question: what to ask.
        sources: the pictures, undecoded, in the order in which the prompt opens with them.
        given: the row's columns as they are, but for the picture.
        error: why the row cannot be asked; then the question, the sources and what is given mean nothing.
    """

    number: int
    id: str
    question: str = ""
    sources: tuple[sources.Source, ...] = field(default=(), repr=False)
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)
    error: str | None = None


class Questions(ABC):
    """The rows of a file or a folder: each has a place, from 0, and any can be read again, in any process.

    Attributes:
        unit: what a row is called: "line", "row" or "picture".
        passed_over: what was not taken for a row, in words for a person; None where that is nothing.
        doubled: by the number of a row whose id was there before: the number of the first that has it, and the id.
    """

    unit = "row"
    passed_over: str | None = None

    def __init__(self, path: Path, question: str | None, needed: Sequence[str]) -> None:
        self._path, self._folder, self._question = path, path.parent, question
        self._needed = tuple(name for name in needed if name != "question" or question is None)
        self.doubled: dict[int, tuple[int, str]] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _rows(self, places: range) -> Iterable[tuple[int, Any]]:
        """The rows at these places: their numbers, and what they hold or the error that hinders to tell."""

    @property
    def sha256(self) -> str:
        """Changes with any row, but not with a picture that a row only names."""
        try:
            with self._path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DatasetError(f"{self._path} cannot be read: {error.strerror}.") from error

    def read(self, places: range) -> list[Question]:
        """Read the rows at these places."""
        return [
            question_of(number, row, self._folder, self._needed, self._question) for number, row in self._rows(places)
        ]

    def _note_doubled(self, ids: Iterable[tuple[int, str]]) -> None:
        numbers: dict[str, int] = {}
        for number, identity in ids:
            first = numbers.setdefault(identity, number)
            if first != number:
                self.doubled[number] = first, identity


def open_questions(
    path: Path, question: str | None = None, needed: Sequence[str] = NEEDED, *, strict: bool = True
) -> Questions:
    """The rows of a .jsonl or .parquet file, or of a folder of pictures.

    Args:
        path: of the file or folder. Paths of pictures in a file count from its folder.
        question: asked of every picture whose row has no `question` of its own; a folder needs it.
        needed: columns that every row must have.
        strict: whether to refuse as a whole what holds no rows, or an id twice, in place of telling in `doubled`.

    Raises:
        DatasetError: there are no such rows, they cannot be read, or two have the same id.
        MissingExtraError: the file is Parquet and pyarrow is not installed.
    """
    path = path.absolute()
    kinds: dict[str, type[Questions]] = {".jsonl": _Lines, ".parquet": _Parquet}
    kind = _Folder if path.is_dir() else kinds.get(path.suffix.lower())
    if kind is None and not path.suffix and not path.exists():
        raise DatasetError(f"there is no file or folder {path}; check the path.")
    if kind is None:
        raise DatasetError(
            f"{path} ends in {path.suffix!r}; questions are read from .jsonl and .parquet files, and from folders of "
            "pictures."
        )
    found = kind(path, question, needed)
    if strict and not len(found):
        raise DatasetError(f"{path} holds no {'picture' if found.unit == 'picture' else 'row to ask'}.")
    for number, (first, identity) in found.doubled.items() if strict else ():
        raise DatasetError(
            f"{path}: the {found.unit}s {first} and {number} both have the id {identity!r} (without one, a row has "
            "its number for an id); give every row an id of its own, or leave all ids out."
        )
    return found


def question_of(
    number: int, row: Any, folder: Path, needed: Sequence[str] = NEEDED, question: str | None = None
) -> Question:
    """What a row asks, or why it cannot be asked.

    Args:
        number: of the row.
        row: its columns by name, or the error that hinders to tell.
        folder: where relative paths of pictures begin.
        needed: columns that it must have.
        question: what is asked where it has none.
    """
    identity = _id(number, row)
    try:
        if isinstance(row, InputError):
            raise row
        if not isinstance(row, dict):
            raise InputError(f"expected an object with {', '.join(needed)}, got {type_name(row)}.")
        given = {name: row[name] for name in COLUMNS if row.get(name) is not None}
        missing = [name for name in needed if name not in given]
        if missing:
            raise InputError(f"{missing[0]!r} is missing; every row needs {', '.join(needed)}.")
        asked = text_of("question", given.get("question", question))
        if writable(asked) != asked:
            raise InputError("the question holds half a character (a lone surrogate).")
        if IMAGE_TOKEN in asked:
            raise InputError(f"the question contains {IMAGE_TOKEN}, which stands for the picture.")
        pictures = sources.picture_sources(given.pop("image"), folder)
    except InputError as error:
        return Question(number, identity, error=str(error))
    return Question(number, identity, asked, pictures, given)


def text_of(name: str, value: Any) -> str:
    """A column's value, which must be a text.

    Raises:
        InputError: it is none, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name!r} must be a text that is not empty, got {value!r}.")
    return value


def type_name(value: Any) -> str:
    """What kind of value JSON or Parquet gave, in words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", bytes: "bytes", list: "a list"}
    return names.get(type(value), "nothing" if value is None else "an object")


def writable(text: str) -> str:
    """The text as UTF-8 can hold it; JSON and the names of files may hold halves of characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _id(number: int, row: Any) -> str:
    given = row.get("id") if isinstance(row, dict) else None
    return str(number) if given is None else writable(str(given))


class _Folder(Questions):
    unit = "picture"

    def __init__(self, path: Path, question: str | None, needed: Sequence[str]) -> None:
        super().__init__(path, question, needed)
        if not set(needed) <= set(NEEDED):
            raise DatasetError(f"{path} is a folder, whose pictures have no answers; give a .jsonl or .parquet file.")
        if question is None:
            raise DatasetError(f"{path} is a folder of pictures; say with --question what to ask of each.")
        self._folder = path
        files = sorted(found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file())
        self._names = [name for name in files if _is_picture(name)]
        others = [name for name in files if not _is_picture(name) and not name.rpartition("/")[2].startswith(".")]
        self.passed_over = _passed_over(others) if others else None
        self._note_doubled(enumerate(map(_spelt, self._names), 1))
        for _, name in self.doubled.values():  # it is not UTF-8, and spelt as another file is called
            raise DatasetError(f"{path} holds two pictures whose id is {name!r}; rename one of them.")

    def __len__(self) -> int:
        return len(self._names)

    @property
    def sha256(self) -> str:
        sizes = (f"{name}\0{(self._folder / name).stat().st_size}\n" for name in self._names)
        return hashlib.sha256(os.fsencode("".join(sizes))).hexdigest()

    def _rows(self, places: range) -> Iterator[tuple[int, Any]]:
        names = ((place + 1, self._names[place]) for place in places)
        return ((number, {"image": name, "id": _spelt(name)}) for number, name in names)


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


class _Lines(Questions):
    unit = "line"

    def __init__(self, path: Path, question: str | None, needed: Sequence[str]) -> None:
        super().__init__(path, question, needed)
        self._numbers, self._begins = array("Q"), array("Q")
        self._note_doubled(self._index())

    def _index(self) -> Iterator[tuple[int, str]]:
        """Note where each line begins that is not blank; its number and its id."""
        begins = 0
        with self._open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._numbers.append(number)
                    self._begins.append(begins)
                    yield number, _id(number, _parsed(line))
                begins += len(line)

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with self._path.open("rb") as file:
                yield file
        except OSError as error:
            raise DatasetError(f"{self._path} cannot be read: {error.strerror}.") from error

    def __len__(self) -> int:
        return len(self._begins)

    def _rows(self, places: range) -> Iterator[tuple[int, Any]]:
        with self._open() as file:
            for place in places:
                file.seek(self._begins[place])
                yield self._numbers[place], _parsed(file.readline())


def _parsed(line: bytes) -> Any:
    """What a line of JSONL holds, or the error."""
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except UnicodeDecodeError:
        return InputError("the line is not UTF-8.")
    except (ValueError, RecursionError) as error:
        return InputError(f"the line is no JSON: {error}.")


class _Parquet(Questions):
    def __init__(self, path: Path, question: str | None, needed: Sequence[str]) -> None:
        super().__init__(path, question, needed)
        with self._open() as file:
            names = file.schema_arrow.names
            for name in self._needed:
                if name not in names:
                    raise DatasetError(
                        f"{path} has no column {name!r}, only {', '.join(sorted(names))}; needed are "
                        f"{', '.join(self._needed)}."
                    )
            self._columns = [name for name in COLUMNS if name in names]
            groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            if "id" in names:
                rows = (row for part in file.iter_batches(columns=["id"]) for row in part.to_pylist())
                self._note_doubled((number, _id(number, row)) for number, row in enumerate(rows, 1))
        self._ends = [sum(groups[: index + 1]) for index in range(len(groups))]
        self._held: tuple[int, Any] = (-1, None)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        """A `pyarrow.parquet.ParquetFile`."""
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError as error:
            raise MissingExtraError(
                f"reading {self._path} needs pyarrow, which is not installed: pip install 'crosstrim[eval]'."
            ) from error
        try:
            with parquet.ParquetFile(self._path) as file:
                yield file
        except (OSError, arrow.ArrowException) as error:
            raise DatasetError(f"{self._path} cannot be read as Parquet: {error}.") from error

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _rows(self, places: range) -> Iterator[tuple[int, Any]]:
        for place in places:
            group = bisect.bisect_right(self._ends, place)
            table, begins = self._group(group), self._ends[group - 1] if group else 0
            yield place + 1, table.slice(place - begins, 1).to_pylist()[0]

    def _group(self, group: int) -> Any:
        """A row group, of which the latest stays in memory: rows are mostly read in order."""
        if self._held[0] != group:
            self._held = (-1, None)
            with self._open() as file:
                self._held = (group, file.read_row_group(group, columns=self._columns))
        return self._held[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": (-1, None)}
