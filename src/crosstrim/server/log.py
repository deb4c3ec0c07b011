"""The server's log: one line on stderr for each request, and for whatever goes wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crosstrim.server import refusals

HEADER = "x-request-id"
PROBES = ("/health", "/ready", "/metrics")
"""Paths that are asked all the time; they get a line only when they fail."""

_LOG = logging.getLogger(__name__)
_LOGGERS = ("crosstrim.server", "uvicorn")
_SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_PLAIN = re.compile(r"[^\s\"=\\]+")
_request_id: ContextVar[str | None] = ContextVar("crosstrim_request_id", default=None)

Kind = Literal["text", "json"]


class Access:
    """ASGI middleware around all else: a request's name, its line in the log, and an answer to what nobody caught.

    Args:
        app: what is within.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and write it down."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        name = given if _SANE.fullmatch(given) else uuid.uuid4().hex
        status, begun = 0, time.monotonic()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        token = _request_id.set(name)
        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            _LOG.error("a request failed", exc_info=error)
            if status:
                raise  # what was begun can only be broken off
            await refusals.FAILED.response(scope["path"])(scope, receive, watch)
        finally:
            _write(scope, status or 499, time.monotonic() - begun)
            _request_id.reset(token)


def _write(scope: Scope, status: int, seconds: float) -> None:
    if scope["path"] in PROBES and status < 400:
        return
    # The path as it was sent: decoded, it could hold the end of a line. A query may hold what is secret.
    path = scope.get("raw_path", scope["path"].encode("unicode_escape")).decode("latin-1").partition("?")[0]
    fields = {
        "client": (scope.get("client") or ["unknown"])[0],
        "method": scope["method"],
        "path": path,
        "status": status,
        "ms": round(seconds * 1000, 1),
    }
    _LOG.info("request", extra={"fields": fields})


@contextlib.contextmanager
def lines(kind: Kind) -> Iterator[None]:
    """Write the server's log on stderr until the end of the block.

    Args:
        kind: "text", with name=value, or "json"; either way one line each.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(kind))
    logger = logging.getLogger(_LOGGERS[0])
    level = logger.level
    logger.setLevel(logging.INFO)
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        logger.setLevel(level)


class _Lines(logging.Formatter):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self._kind = kind

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        values: dict[str, Any] = {
            "time": when,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if (name := _request_id.get()) is not None:
            values["id"] = name
        values |= getattr(record, "fields", {})
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        if self._kind == "json":
            return json.dumps(values)
        return " ".join(f"{key}={_quoted(value)}" for key, value in values.items())


def _quoted(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
