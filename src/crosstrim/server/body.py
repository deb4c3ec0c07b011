"""A request's JSON, bounded before it is parsed, and parsed beside the event loop."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException

from crosstrim.server.settings import BESIDE_PICTURES

MAX_VALUES = 20_000
"""Objects, lists and what is in them, in one body."""

MAX_DEPTH = 32
"""Of objects and lists in one another."""

_MAX_QUOTES = 4 * MAX_VALUES  # a name and a text for each value
_MAX_CUTS = 1_000
_DATA_URI = b";base64,"
_IMAGES = b'"images"'
_OPENING = re.compile(rb'\s*:\s*\[\s*"')
_FURTHER = re.compile(rb'"\s*,\s*"')
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
    """The body without what is in its pictures' strings."""
    beside = _without(_without(body, _data_uris(body)), _images(body))
    if len(beside) > BESIDE_PICTURES:
        raise HTTPException(
            413,
            f"beside its pictures the body has {len(beside)} bytes; the limit is {BESIDE_PICTURES}. Make it shorter.",
        )
    return beside


def _without(body: bytes, spans: Iterable[tuple[int, int]]) -> bytes:
    pieces: list[bytes] = []
    place = 0
    for begin, end in itertools.islice(spans, _MAX_CUTS):
        pieces.append(body[place:begin])
        place = end
    return b"".join([*pieces, body[place:]])


def _data_uris(body: bytes) -> Iterator[tuple[int, int]]:
    """What follows `;base64,` in a string."""
    place = 0
    while (found := body.find(_DATA_URI, place)) >= 0:
        begin = found + len(_DATA_URI)
        place = _end(body, begin)
        yield begin, place


def _images(body: bytes) -> Iterator[tuple[int, int]]:
    """The texts of lists that are called "images", as Ollama's are: nothing in them says that they are pictures."""
    place = 0
    while (found := body.find(_IMAGES, place)) >= 0:
        place = found + len(_IMAGES)
        opening = _OPENING.match(body, place)
        while opening is not None:
            place = _end(body, opening.end())
            yield opening.end(), place
            opening = _FURTHER.match(body, place)


def _end(body: bytes, begin: int) -> int:
    """Where the base64 ends that begins here, which is at a quote; `begin` where what is here is something else."""
    end = body.find(b'"', begin)
    # Without its backslash a quote inside of a string would seem to end it, and hide all that follows.
    return begin if end < 0 or body[end - 1 : end] == b"\\" else end


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


class AnyTypeRoute(BoundedRoute):
    """A bounded route that reads bodies as JSON whatever they are called; Ollama does, and curl calls them a form.

    But not from browsers, which say where a request comes from: a page may send a form to any server, and JSON only
    to one that lets it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, given requests whose body is called JSON."""
        handler = super().get_route_handler()

        async def of_any_type(request: Request) -> Response:
            headers = MutableHeaders(raw=list(request.scope["headers"]))
            if "origin" not in headers:
                headers["content-type"] = "application/json"
            return await handler(Request({**request.scope, "headers": headers.raw}, request.receive))

        return of_any_type


class _BoundedRequest(Request):
    async def json(self) -> Any:
        return await asyncio.to_thread(parse, await self.body())
