"""Processes that tests look at from outside.

A forked process has what this one has imported: starting one takes a moment, where a fresh interpreter spends seconds
on torch and transformers. But it has none of this one's threads, such as torch's once a model was loaded, and Ray's.
What would miss them is forked off a process that has imported and done nothing else. What is tested of programs as
users start them belongs into a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def start(
    function: Callable[..., object],
    *arguments: Any,
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    imported: Sequence[str] = (),
) -> BaseProcess:
    """A process that calls a function, with its output in `log`.

    Args:
        function: what to call; where `imported`, a function of a module.
        arguments: for the function.
        log: takes standard output and standard error.
        environment: what to add to the environment, for what reads it from now on.
        folder: where the process is to be.
        imported: fork it off a process that has imported these modules and done nothing else. There is one such
            process, with the modules and the environment of the first time.
    """
    if imported:
        multiprocessing.set_forkserver_preload(list(imported))
    process = multiprocessing.get_context("forkserver" if imported else "fork").Process(
        target=_call, args=(function, arguments, log, dict(environment or {}), folder)
    )
    process.start()
    return process


def run(function: Callable[..., object], *arguments: Any, log: Path, timeout: float = 600, **where: Any) -> str:
    """Let a process call a function and end; what it wrote. `where` is as for `start`."""
    process = start(function, *arguments, log=log, **where)
    finish(process, log, timeout)
    return log.read_text(encoding="utf-8", errors="replace")


def as_program(module: str, arguments: Sequence[str]) -> None:
    """Do what `python -m` does with a module and its arguments, for a process to begin with."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


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
