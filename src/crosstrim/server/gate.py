"""What every request passes before its body is read: the key, whether there is room, the body's limit."""

from __future__ import annotations

import asyncio
import hmac
import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crosstrim.server.refusals import RETRY, Refusal
from crosstrim.server.service import Service
from crosstrim.server.settings import Settings

CHAT = "/v1/chat/completions"
OLLAMA_CHAT = "/api/chat"
OLLAMA_GENERATE = "/api/generate"

ASKING = frozenset({CHAT, OLLAMA_CHAT, OLLAMA_GENERATE})
"""Paths whose POST requests are answered by the model: they are counted, and have their place in the queue."""

OPEN = ("/health", "/ready", "/openapi.json")
"""Paths that need no key."""

SILENT_SECONDS = 30.0
"""How long nothing of a body may come; a request has its place in the queue meanwhile."""

_PLAIN_BYTES = 64 << 10  # of a body that asks the model nothing

BEGUN = "crosstrim.begun"
"""Where in a request's scope it stands when it began, by `time.monotonic`."""

_NO_KEY = Refusal(
    401,
    "the API key is missing or wrong.",
    "authentication_error",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)
_GOING_DOWN = Refusal(
    503, "the server is going down; try again later.", "server_error", code="going_down", headers=RETRY
)


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind the gate.
        settings: the limits.
        service: whether it is going down, and where requests to the model are counted.
    """

    def __init__(self, app: ASGIApp, settings: Settings, service: Service) -> None:
        self._app = app
        self._settings = settings
        self._service = service
        self._metrics = service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in ASKING and scope["method"] == "POST":
            await self._count(scope, receive, send)
        else:
            refusal = self._refuse(scope)
            await (refusal or self._app)(scope, self._limited(receive, self._limit(scope)), send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, begun = 499, time.monotonic()  # what a server writes down for a client that left

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refuse(scope) or self._refuse_further(scope)
        try:
            if refusal is not None:
                await refusal(scope, receive, watch)
            else:
                await self._admit(scope, receive, watch)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.requests.labels(status).inc()
            self._metrics.seconds.observe(time.monotonic() - begun)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.unfinished += 1
        self._metrics.unfinished.set(self._service.unfinished)
        scope[BEGUN] = time.monotonic()
        try:
            await self._app(scope, self._limited(receive, self._limit(scope)), send)
        finally:
            self._service.unfinished -= 1
            self._metrics.unfinished.set(self._service.unfinished)

    def _refuse(self, scope: Scope) -> ASGIApp | None:
        headers, path = Headers(scope=scope), scope["path"]
        if path not in OPEN and not self._has_key(headers):
            return _NO_KEY.response(path)
        announced, limit = headers.get("content-length", "0"), self._limit(scope)
        if not announced.isdecimal() or int(announced) > limit:
            return Refusal(413, _too_large(limit), code="request_too_large").response(path)
        return None

    def _refuse_further(self, scope: Scope) -> ASGIApp | None:
        if self._service.draining:
            return _GOING_DOWN.response(scope["path"])
        if self._service.unfinished < self._settings.queue_limit:
            return None
        words = f"{self._service.unfinished} requests are unfinished, which is the limit; try again later."
        return Refusal(429, words, "rate_limit_error", code="queue_full", headers=RETRY).response(scope["path"])

    def _has_key(self, headers: Headers) -> bool:
        if not self._settings.api_keys:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # All are compared, so that the time tells nothing of which was nearly right.
        right = [hmac.compare_digest(given.encode("latin-1"), key.encode()) for key in self._settings.api_keys]
        return any(right) and scheme.lower() == "bearer"

    def _limit(self, scope: Scope) -> int:
        """Bytes of a body: only requests that have their place in the queue may bring pictures."""
        return self._settings.max_body_bytes if scope["path"] in ASKING else _PLAIN_BYTES

    def _limited(self, receive: Receive, limit: int) -> Receive:
        """The body, as long as it is neither too large nor too slow."""
        deadline = time.monotonic() + self._settings.timeout
        count, whole = 0, False

        async def limited() -> Message:
            nonlocal count, whole
            if whole:
                return await receive()
            try:
                left = min(deadline - time.monotonic(), SILENT_SECONDS)
                message = await asyncio.wait_for(receive(), max(0.001, left))
            except TimeoutError as error:
                raise HTTPException(408, "the request's body did not arrive in time.") from error
            count += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if count > limit:
                raise HTTPException(413, _too_large(limit))
            return message

        return limited


def _too_large(limit: int) -> str:
    return f"the request's body is larger than {limit} bytes, which is the limit."
