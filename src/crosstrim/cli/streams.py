"""Standard streams that are closed, or that take no more: one line on stderr in place of a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Refuse to begin without a standard output, and to end well when it did not take everything.

    Raises:
        SystemExit: with 1, after a line on stderr.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it stays for the rest of the process
    if sys.stdout is None:
        _refuse("standard output is closed; send it to a file, or to /dev/null.")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise  # it is not of a stream
        # Python flushes once more when it ends, and would complain that it cannot.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _refuse("" if error.errno == errno.EPIPE else f"the output cannot be written: {error.strerror}.")


def _refuse(words: str) -> None:
    if words:
        with contextlib.suppress(OSError):  # stderr may be on the same full disk
            print(f"crosstrim: {words}", file=sys.stderr, flush=True)
    sys.exit(1)
