"""Collects requests that may run together, for the one thread that owns the model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from crosstrim.errors import EngineError
from crosstrim.server.chat import Chat, DeviceLostError, Failed

_LOG = logging.getLogger(__name__)
_CLOSING_SECONDS = 5.0  # that a batch which nobody waits for any more may hold up the end


class Scheduler:
    """A thread that takes the oldest request and those of its group that come in time.

    An error of one batch is told to its requests, and the thread goes on. If it ends nonetheless, `failure` says so,
    every request that runs or waits is told, and further ones are refused.

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
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="crosstrim-model", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread before it was told to end; None while all is well."""
        return self._failure

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    def submit(self, chat: Chat) -> None:
        """Put a request into the queue.

        Raises:
            EngineError: the server is going down, or the thread has ended.
        """
        with self._changed:
            if self._failure is not None:
                raise EngineError("the model works no more and this server ends; try again later.")
            if self._closed:
                raise EngineError("the server is going down; try again later.")
            self._waiting.append(chat)
            self._changed.notify()

    def forget(self, chat: Chat) -> None:
        """Take a request out of the queue, if it is there still: its pictures need not wait for its turn."""
        with self._changed:
            if chat in self._waiting:
                self._waiting.remove(chat)

    def close(self) -> None:
        """Finish the batch that runs, refuse those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify()
        for chat in waiting:
            chat.tell(Failed(EngineError("the server is going down; try again later.")))
        self._thread.join(_CLOSING_SECONDS)

    def _run(self) -> None:
        batch: list[Chat] = []
        try:
            while batch := self._next():
                self._answer_or_tell(batch)
        except BaseException as error:  # whatever it was, nobody may go on waiting for this thread
            self._give_up(batch, error)

    def _answer_or_tell(self, batch: Sequence[Chat]) -> None:
        try:
            self._answer(batch)
        except DeviceLostError:
            raise
        except Exception as error:  # of this batch; the model is as it was, so the next one may do
            for chat in batch:
                chat.tell(Failed(error))
        finally:
            for chat in batch:
                chat.pictures = ()  # also where an error's traceback still refers to the request

    def _give_up(self, batch: Sequence[Chat], error: BaseException) -> None:
        with self._changed:
            self._failure = error
            waiting, self._waiting = self._waiting, []
        _LOG.critical("the thread that owns the model ended; no further request can be answered", exc_info=error)
        lost = RuntimeError("the thread that owns the model ended")
        lost.__cause__ = error
        for chat in (*batch, *waiting):
            chat.tell(Failed(lost))

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
                if len(batch) == self._max_batch or left <= 0:
                    self._waiting = [chat for chat in self._waiting if chat not in batch]
                    return batch
                self._changed.wait(left)
