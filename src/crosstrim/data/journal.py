"""A file that a run can be killed over: what was computed is on disk line by line, and is never computed again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from crosstrim.errors import ResultError, UnwritableError

Record = dict[str, Any]


class Journal:
    """An append-only JSONL file: a header that says which run it belongs to, then one record per line.

    Opening it reads what an earlier run left. A last line that a kill cut off is dropped, and so are zero
    bytes that a crash of the machine left in the place of the last lines.

    Args:
        path: of the file, which is made if there is none.
        header: what the run depends on, in plain JSON types.

    Raises:
        ResultError: the file belongs to a run of something else, another process writes it, or it cannot be
            used.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[Record] = []
        try:
            self._file: BinaryIO = path.open("ab+")
        except OSError as error:
            raise ResultError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            _lock(self._file, path)
            self._resume(dict(header))
        except BaseException:
            self._file.close()
            raise

    def _resume(self, header: Record) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = _whole(content)
        self._file.truncate(whole)
        lines = content[:whole].splitlines()
        if not lines:
            self.append(header)
            self.records.clear()
            return
        try:
            found, *self.records = map(json.loads, lines)
        except ValueError as error:
            raise ResultError(f"{self.path} is damaged; delete it to start anew.") from error
        check_same(found, header, self.path)

    def distinct(self, count: Callable[[Record], int]) -> list[Record]:
        """The records in the order of what they are of, without those of what another has: a line may be there twice.

        Args:
            count: how many things a record is of, from the place that its `first` names.

        Raises:
            ResultError: a record says no such thing.
        """
        try:
            spans = [(int(record["first"]), count(record), record) for record in self.records]
        except (KeyError, TypeError, ValueError) as error:
            raise ResultError(f"{self.path} is damaged; delete it to start anew.") from error
        found, end = [], 0
        for first, length, record in sorted(spans, key=lambda span: span[0]):
            if first >= end:
                found.append(record)
                end = first + length
        return found

    def append(self, record: Record) -> None:
        """Write a record; when this returns, it is on disk.

        Raises:
            UnwritableError: the system refused. The journal is closed, and a part of the line may be in it.
        """
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # it would try to write the same again
                self._file.close()
            raise UnwritableError(f"{self.path} cannot be written: {error.strerror}.") from error
        self.records.append(record)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()


def _whole(content: bytes) -> int:
    """Bytes of the lines that were written whole; JSON holds no zero byte."""
    whole = content.rfind(b"\n") + 1
    while whole:
        begins = content.rfind(b"\n", 0, whole - 1) + 1
        if b"\0" not in content[begins:whole]:
            break
        whole = begins
    return whole


def journal_of(out: Path) -> Path:
    """Where the journal of a run lies that writes `out` when all is done."""
    return out.with_name(f"{out.name}.journal")


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a file that belongs to a run of something else.

    Raises:
        ResultError: it names what differs.
    """
    wanted = json.loads(json.dumps(wanted))  # tuples come back as lists
    for name, value in wanted.items():
        there = found.get(name) if isinstance(found, Mapping) else None
        if there != value:
            raise ResultError(
                f"{path} is a run with other {_difference(name, there, value)}; run it as it was begun, give another "
                "output, or delete it."
            )


def _difference(name: str, there: Any, here: Any) -> str:
    """Where two values differ first: `versions.torch (2.12.0 there, 2.13.0 here)`."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        key = next(key for key in {**there, **here} if there.get(key) != here.get(key))
        return _difference(f"{name}.{key}", there.get(key), here.get(key))
    if isinstance(there, list) and isinstance(here, list):
        return _difference_of_lists(name, there, here)
    return f"{name} ({there} there, {here} here)"


def _difference_of_lists(name: str, there: list[Any], here: list[Any]) -> str:
    """What only one of them has: `settings (only there: union k=0.1; only here: union k=0.2, grid k=0.2)`."""
    lost, new = ([one for one in ours if one not in theirs] for ours, theirs in ((there, here), (here, there)))
    if lost and new and _label(lost[0]) == _label(new[0]):  # the same by name and not in what it holds
        return _difference(f"{name} {_label(lost[0])}", lost[0], new[0])
    sides = {f"only {where}": side for where, side in (("there", lost), ("here", new)) if side}
    words = [f"{where}: {_labels(side)}" for where, side in sides.items()]
    return f"{name} ({'; '.join(words) or 'in another order'})"


def _labels(items: list[Any], most: int = 4) -> str:
    rest = [f"{len(items) - most} more"] if len(items) > most else []
    return ", ".join([*map(_label, items[:most]), *rest])


def _label(item: Any) -> str:
    return str(item.get("label", item)) if isinstance(item, Mapping) else str(item)


def _lock(file: BinaryIO, path: Path) -> None:
    """Let no other process write the file, where the system can; the lock ends with the process."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ResultError(f"{path} is being written by another run; wait for it, or give another output.") from error
    except OSError:
        return  # some network file systems have no locks
