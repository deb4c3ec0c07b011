"""How much memory some work needs at its peak, on Linux."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from crosstrim.errors import CrosstrimError

Result = TypeVar("Result")

ALL_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""In the environment of a process: glibc maps all but small tensors on their own and returns them at once, so that a
peak is what is needed at once. It is slow."""


def apart(module: str, *arguments: object, doing: str, **variables: str) -> Any:
    """What a module prints as JSON when it is run in a process of its own, whose peak is that of nothing else.

    Args:
        module: to run.
        *arguments: of its command line.
        doing: what it does, for the message.
        **variables: of its environment, beside those of this process.

    Raises:
        CrosstrimError: the process fails.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    if process.returncode:
        raise CrosstrimError(
            f"the process that {doing} ended with code {process.returncode}: "
            f"{(process.stderr.strip().splitlines() or ['it was killed'])[-1]}; give it more memory, or try --quick."
        )
    return json.loads(process.stdout)


def peak_mib(work: Callable[[], Result]) -> tuple[Result, float | None]:
    """Do some work once.

    Returns:
        Its result, and how far this process's resident memory rose above what it was before, in MiB, the result
        included; None where the system is not Linux.
    """
    if sys.platform != "linux":
        return work(), None
    gc.collect()  # else what is swept up while the work is done would be counted against what it takes
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # forget the peak so far
    before = _resident_mib("VmRSS")
    result = work()
    return result, _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024
