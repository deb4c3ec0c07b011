"""From the events of an answer to what goes over the wire, whichever API the client speaks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import StreamingResponse

from crosstrim.server import refusals
from crosstrim.server.asked import Asked
from crosstrim.server.chat import Delta, Event, Finished
from crosstrim.server.gate import BEGUN
from crosstrim.server.service import ClientLeftError, Service


class Reply(Protocol):
    """One answer in the shape of one API; the events of a stream are given to `pieces` in order."""

    @property
    def media_type(self) -> str:
        """Of a stream."""

    @property
    def closing(self) -> str:
        """What a stream ends with after its last piece, unless it ends with an error."""

    def whole(self, answer: Delta, finished: Finished) -> Any:
        """The answer in one piece, for FastAPI to write."""

    def opening(self) -> Iterable[dict[str, Any]]:
        """What a stream begins with."""

    def pieces(self, event: Event) -> Iterable[dict[str, Any]]:
        """What a stream has for an event."""

    def framed(self, piece: dict[str, Any]) -> str:
        """A piece as it is written."""


async def answer(service: Service, asked: Asked, reply: Reply, request: Request) -> Any:
    """Answer a request, whole or as a stream. What is refused before the first piece is raised, for a status."""
    events = service.events(asked, request.is_disconnected, request.scope.get(BEGUN))
    if asked.stream:
        first = await anext(events)
        written = _stream(first, events, reply, request.scope["path"])
        return StreamingResponse(written, media_type=reply.media_type)
    async with contextlib.aclosing(events) as answering:
        return _whole([event async for event in answering], reply)


def _whole(events: Sequence[Event], reply: Reply) -> Any:
    finished = next(event for event in events if isinstance(event, Finished))
    deltas = [event for event in events if isinstance(event, Delta)]
    text = "".join(delta.text for delta in deltas)
    return reply.whole(Delta(text, tuple(token for delta in deltas for token in delta.tokens)), finished)


async def _stream(first: Event, events: AsyncGenerator[Event], reply: Reply, path: str) -> AsyncIterator[str]:
    try:
        async with contextlib.aclosing(events) as rest:
            for piece in reply.opening():
                yield reply.framed(piece)
            event: Event | None = first
            while event is not None:
                for piece in reply.pieces(event):
                    yield reply.framed(piece)
                event = await anext(rest, None)
    except ClientLeftError:
        return
    except Exception as error:  # the status is sent already; the stream can only end with the error
        yield reply.framed(refusals.of(error).body(path))
        return
    if reply.closing:
        yield reply.closing
