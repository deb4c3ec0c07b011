"""A request's JSON, bounded before it is parsed, and parsed beside the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from crosstrim.server.settings import BESIDE_PICTURES

MAX_VALUES = 20_000
"""Objects, lists and what is in them, in one body."""

MAX_DEPTH = 32
"""Of objects and lists in one another."""

_MAX_QUOTES = 4 * MAX_VALUES  # a name and a text for each value
_MAX_CUTS = 1_000
_PICTURE = b";base64,"
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse(body: bytes) -> Any:
    """The JSON in a body.

    Parsing is one call, during which no other thread runs. So what makes it slow is counted before, in few passes:
    how much there is beside pictures, how many values, and how deep they lie.

    Raises:
        HTTPException: it is too large, too nested, or of too many values, or no UTF-8.
        json.JSONDecodeError: it is no JSON.
    """
    _check_structure(_beside_pictures(body))
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is no UTF-8: {error.reason}, at byte {error.start}.") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise HTTPException(400, f"the body holds a number that cannot be read: {error}.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _beside_pictures(body: bytes) -> bytes:
    """The body without what follows a picture's `;base64,` up to the next quote, which is inside of a string."""
    pieces: list[bytes] = []
    place = 0
    while len(pieces) < _MAX_CUTS and (cut := body.find(_PICTURE, place)) >= 0:
        pieces.append(body[place:cut])
        end = body.find(b'"', cut)
        place = len(body) if end < 0 else end
    size = sum(map(len, pieces)) + len(body) - place
    if size > BESIDE_PICTURES:
        raise HTTPException(
            413, f"beside its pictures the body has {size} bytes; the limit is {BESIDE_PICTURES}. Make it shorter."
        )
    return b"".join([*pieces, body[place:]])


def _check_structure(body: bytes) -> None:
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")  # then every quote opens or closes a string
    if plain.count(b'"') > _MAX_QUOTES:
        raise _too_many(plain.count(b'"') // 2, "texts and names", _MAX_QUOTES // 2)
    outside = b"".join(plain.split(b'"')[::2])
    values = sum(map(outside.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise _too_many(values, "values", MAX_VALUES)
    depth = 0
    for bracket in outside.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise HTTPException(400, f"the body's values lie more than {MAX_DEPTH} deep in one another; the limit.")


def _too_many(count: int, what: str, limit: int) -> HTTPException:
    return HTTPException(400, f"the body holds {count} {what}; the limit is {limit}. Send fewer.")


class BoundedRoute(APIRoute):
    """A route whose requests' bodies are parsed by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler as FastAPI makes it, given requests of the other kind."""
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handler(_BoundedRequest(request.scope, request.receive))

        return bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        return await asyncio.to_thread(parse, await self.body())
