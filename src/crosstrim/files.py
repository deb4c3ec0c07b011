"""Files of results: written whole or not at all, and read again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crosstrim.errors import ResultError, UnwritableError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write inside the block, which takes the place of `path` at its end, or not at all.

    It lies in the same folder under a hidden name with the same ending, by which some writers know the format. A
    link stays what it is: the file that it leads to is written.

    Raises:
        UnwritableError: it cannot be written.
    """
    written = Path(os.path.realpath(path))
    unfinished = written.with_name(f".{written.stem}.{os.getpid()}{written.suffix}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(written)
    except OSError as error:
        raise UnwritableError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON to a file, whole or not at all.

    Raises:
        UnwritableError: it cannot be written.
    """
    with written_whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        json.dump(result, file)
        file.write("\n")


def write_text(path: Path, text: str) -> None:
    """Write text to a file, whole or not at all.

    Raises:
        UnwritableError: it cannot be written.
    """
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ResultError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ResultError(f"{path} is no JSON: {error}.") from error
