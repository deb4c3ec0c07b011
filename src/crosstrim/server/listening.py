"""uvicorn, made to drain before it ends and to leave clients that are silent."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from crosstrim.server.front import Front
from crosstrim.server.settings import Settings

GRACE_SECONDS = 5
"""Beyond the time that a request may take, until the end is no longer waited for."""

SILENT_SECONDS = 30.0
"""How long a connection may bring no whole head of a request, or take nothing of an answer."""

MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers."""


class Server(uvicorn.Server):
    """uvicorn's server around a `Front`.

    The first signal makes it drain: new requests get 503, those in flight go on, and it ends with the last of them.
    A second signal ends it at once, and so does one that comes before the model is loaded.

    Args:
        front: what to serve.
        settings: the limits.
    """

    def __init__(self, front: Front, settings: Settings) -> None:
        self._front = front
        self._limit = settings.timeout + GRACE_SECONDS
        self._draining_since: float | None = None
        config = uvicorn.Config(
            front,
            log_level="warning",
            log_config=None,  # its lines are written with ours
            access_log=False,
            # httptools would collect headers without end, and no websockets are served.
            http=GuardedProtocol,
            ws="none",
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_graceful_shutdown=math.ceil(self._limit),
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; end where there is nothing to drain, or at the second signal."""
        service = self._front.service
        if service is None:
            if sig == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        elif self._draining_since is None:
            self._draining_since = time.monotonic()
            service.draining = True
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether it is time to end."""
        service = self._front.service
        if self._front.failure is not None or (service is not None and service.failure is not None):
            self.should_exit = True
        elif service is not None and self._draining_since is not None:
            over = time.monotonic() - self._draining_since > self._limit
            self.should_exit = self.should_exit or over or service.unfinished == 0
        return await super().on_tick(counter)


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 that leaves clients which are silent where they ought to speak, or do not take what they asked for.

    uvicorn's own limit holds only between two requests, and ends with the next byte.
    """

    _guard: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the head of a request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take in what came; with a whole head the waiting is over."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()

    def on_response_complete(self) -> None:
        """Wait for the head of the next request."""
        self._watch()
        super().on_response_complete()
        if not self.cycle.response_complete:  # the next had come already
            self._unwatch()

    def pause_writing(self) -> None:
        """The client takes nothing: wait for it."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """The client took something."""
        super().resume_writing()
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to wait for."""
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._unwatch()
        self._guard = self.loop.call_later(SILENT_SECONDS, self.transport.abort)

    def _unwatch(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None
