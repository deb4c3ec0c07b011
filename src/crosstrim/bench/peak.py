"""How much memory some work needs at its peak, on Linux."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

ALL_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""In the environment of a process: glibc maps all but small tensors on their own and returns them at once, so that a
peak is what is needed at once. It is slow."""


def peak_mib(work: Callable[[], Result]) -> tuple[Result, float | None]:
    """Do some work once.

    Returns:
        Its result, and how far this process's resident memory rose above what it was before, in MiB, the result
        included; None where the system is not Linux.
    """
    if sys.platform != "linux":
        return work(), None
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # forget the peak so far
    before = _resident_mib("VmRSS")
    result = work()
    return result, _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024
