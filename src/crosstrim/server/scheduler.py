"""Collects requests that may run together, for the one thread that owns the model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from crosstrim.errors import EngineError
from crosstrim.server.chat import Chat, Failed


class Scheduler:
    """A thread that takes the oldest request and those of its group that come in time.

    Args:
        answer: answers requests of one group; called by the thread alone.
        max_batch: requests that run together.
        max_wait: seconds that the oldest waits for others, counted from its arrival.
    """

    def __init__(self, answer: Callable[[Sequence[Chat]], None], max_batch: int, max_wait: float) -> None:
        self._answer = answer
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._waiting: list[Chat] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="crosstrim-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    def submit(self, chat: Chat) -> None:
        """Put a request into the queue.

        Raises:
            EngineError: the server is going down.
        """
        with self._changed:
            if self._closed:
                raise EngineError("the server is going down; try again later.")
            self._waiting.append(chat)
            self._changed.notify()

    def close(self) -> None:
        """Finish the batch that runs, refuse those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify()
        for chat in waiting:
            chat.tell(Failed(EngineError("the server is going down; try again later.")))
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[Chat]:
        """The next batch; empty when there will be none."""
        with self._changed:
            while True:
                self._waiting = [chat for chat in self._waiting if not chat.cancelled.is_set()]
                if self._closed:
                    return []
                if not self._waiting:
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                batch = [chat for chat in self._waiting if chat.group == oldest.group][: self._max_batch]
                left = oldest.arrived + self._max_wait - time.monotonic()
                if len(batch) == self._max_batch or oldest.sampled or left <= 0:
                    self._waiting = [chat for chat in self._waiting if chat not in batch]
                    return batch
                self._changed.wait(left)
