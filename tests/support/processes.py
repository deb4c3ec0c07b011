"""Processes that tests look at from outside.

A forked process has what this one has imported: starting one takes a moment, where a fresh interpreter spends seconds
on torch and transformers. What is tested of programs as users start them belongs into a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def start(
    function: Callable[..., object],
    *arguments: Any,
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    anew: bool = False,
) -> BaseProcess:
    """A process that calls a function, with its output in `log`.

    Args:
        function: what to call; where `anew`, a function of a module.
        arguments: for the function.
        log: takes standard output and standard error.
        environment: what to add to the environment, for what reads it from now on.
        folder: where the process is to be.
        anew: begin with a fresh interpreter.
    """
    process = multiprocessing.get_context("spawn" if anew else "fork").Process(
        target=_call, args=(function, arguments, log, dict(environment or {}), folder)
    )
    process.start()
    return process


def run(function: Callable[..., object], *arguments: Any, log: Path, timeout: float = 600, **where: Any) -> str:
    """Let a process call a function and end; what it wrote. `where` is as for `start`."""
    process = start(function, *arguments, log=log, **where)
    finish(process, log, timeout)
    return log.read_text(encoding="utf-8", errors="replace")


def finish(process: BaseProcess, log: Path, timeout: float = 600) -> None:
    """Wait for the end of a process, which must be a good one."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, log.read_text(encoding="utf-8", errors="replace")[-5000:]


def _call(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    log: Path,
    environment: dict[str, str],
    folder: Path | None,
) -> None:
    os.environ.update(environment)
    os.chdir(folder or ".")
    sys.stdout = sys.stderr = log.open("w", buffering=1, encoding="utf-8")
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    function(*arguments)
