"""The memory of decoded pictures: bounded while they are needed, and given back afterwards."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections import deque

_LARGE = 4_000_000
"""Pixels whose memory is worth a walk through the allocator."""


class Taken:
    """Pixels that a request may hold decoded. They are given back when nothing refers to this any more."""


class Pixels:
    """How many pixels may be decoded at once, by any threads; who asks first gets them first.

    Args:
        limit: the pixels there are.

    Attributes:
        limit: likewise.
        in_use: pixels that are taken.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self._line: deque[object] = deque()
        # Reentrant, as it must be: pixels may be given back by whatever line of code drops the last reference.
        self._changed = threading.Condition(threading.RLock())

    @property
    def waiting(self) -> int:
        """How many wait for pixels."""
        return len(self._line)

    def take(self, count: int, deadline: float | None = None) -> Taken:
        """Wait for pixels.

        A request takes all that it needs at once: two that held some and waited for more could wait for each other.

        Args:
            count: how many, at most `limit`.
            deadline: `time.monotonic` when they are not wanted any more; None is never.

        Raises:
            TimeoutError: others had them until the deadline.
        """
        place = object()
        with self._changed:
            self._line.append(place)
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._changed.wait_for(lambda: self._line[0] is place and self._fits(count), left):
                    raise TimeoutError
                self.in_use += count
            finally:
                self._line.remove(place)
                self._changed.notify_all()  # the next in line may fit as well
        taken = Taken()
        weakref.finalize(taken, self._give_back, count).atexit = False
        return taken

    def _fits(self, count: int) -> bool:
        return self.in_use + count <= self.limit

    def _give_back(self, count: int) -> None:
        with self._changed:
            self.in_use -= count
            self._changed.notify_all()
        if count >= _LARGE:
            give_memory_back()


def give_memory_back() -> None:
    """Hand what is free in the allocator's arenas back to the system; glibc keeps it otherwise. Elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
