"""The HTTP side: routes, streams and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

import crosstrim
from crosstrim.errors import ConfigError, ContextLengthError, CrosstrimError, EngineError, InputError
from crosstrim.server import schema, wording
from crosstrim.server.body import BoundedRoute
from crosstrim.server.chat import Delta, Event, Finished
from crosstrim.server.gate import BEGUN, CHAT, RETRY, Gate
from crosstrim.server.log import Access
from crosstrim.server.service import ClientLeftError, ModelFailedError, Service, TimedOutError
from crosstrim.server.settings import Settings

_LOG = logging.getLogger(__name__)
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorResponse, "description": words}
    for status, words in {
        400: "The request cannot be answered as it is.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "Too many requests are unfinished.",
        500: "The server failed.",
        503: "The server is going down, or not ready.",
        504: "The answer took too long.",
    }.items()
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer, or a stream of its pieces."}
}


class _NoSuchModelError(Exception):
    pass


_KNOWN = (
    CrosstrimError,
    HTTPException,
    RequestValidationError,
    ClientLeftError,
    ModelFailedError,
    TimedOutError,
    _NoSuchModelError,
)


def build(service: Service, settings: Settings) -> FastAPI:
    """The application around a model.

    Args:
        service: the model at work; closed when the application shuts down.
        settings: what to serve, and the limits.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)  # it waits for the model's thread

    # The pages that FastAPI adds would load scripts from elsewhere.
    app = FastAPI(title="crosstrim", version=crosstrim.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = BoundedRoute
    app.add_middleware(Gate, settings=settings, service=service)
    app.add_middleware(Access)
    for kind in _KNOWN:
        app.add_exception_handler(kind, _answer_error)
    # For the schema alone: the gate asks for the key, before the body is read.
    described = HTTPBearer(description="The server's API key.", auto_error=False)
    keyed = [Depends(described)] if settings.api_keys else []
    card = schema.ModelCard(id=settings.model_id, created=int(time.time()))

    def check_model(name: str) -> None:
        if name not in (card.id, settings.model):
            raise _NoSuchModelError(f"there is no model {name!r} here, only {card.id!r}.")

    @app.post(CHAT, response_model=schema.ChatCompletion, responses={**_REFUSALS, **_STREAM}, dependencies=keyed)
    async def chat(body: schema.ChatRequest, request: Request) -> Any:
        """Answer a question, about pictures or not."""
        check_model(body.model)
        reply = _Reply(card.id)
        events = service.events(body, request.is_disconnected, request.scope.get(BEGUN))
        if not body.stream:
            async with contextlib.aclosing(events) as answering:
                return reply.whole([event async for event in answering])
        first = await anext(events)  # what is refused gets a status of its own
        return StreamingResponse(
            _sse(reply.pieces(first, events, body.stream_options)), media_type="text/event-stream"
        )

    @app.get("/v1/models", responses={401: _REFUSALS[401]}, dependencies=keyed)
    async def models() -> schema.ModelList:
        """The model that is served."""
        return schema.ModelList(data=[card])

    @app.get("/v1/models/{name:path}", responses={401: _REFUSALS[401], 404: _REFUSALS[404]}, dependencies=keyed)
    async def model(name: str) -> schema.ModelCard:
        """The model of this name."""
        check_model(name)
        return card

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: _REFUSALS[503]})
    async def health() -> schema.Status:
        """Whether the server is up, and its model at work."""
        if service.failure is not None:
            raise EngineError("the model works no more, and this server ends.")
        return schema.Status(status="ok")

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: _REFUSALS[503]})
    async def ready() -> schema.Status:
        """Whether requests are taken: not before the model is loaded, nor when the server is going down."""
        if service.draining:
            raise EngineError("the server is going down; ask another.")
        await health()
        return schema.Status(status="ready")

    @app.get(
        "/metrics",
        responses={401: _REFUSALS[401], 200: {"content": {"text/plain": {}}}},
        response_class=Response,
        dependencies=keyed,
    )
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    return app


class _Reply:
    """The JSON of one answer."""

    def __init__(self, model: str) -> None:
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._unused: dict[str, None] = {}  # the usage in all but the last chunk, where it is asked for

    def whole(self, events: list[Event]) -> schema.ChatCompletion:
        finished = next(event for event in events if isinstance(event, Finished))
        text = "".join(event.text for event in events if isinstance(event, Delta))
        choice = schema.Choice(message=schema.AnswerMessage(content=text), finish_reason=finished.reason)
        return schema.ChatCompletion(**self._common, choices=[choice], usage=_usage(finished))

    async def pieces(
        self, first: Event, events: AsyncGenerator[Event], options: schema.StreamOptions | None
    ) -> AsyncGenerator[dict[str, Any]]:
        async with contextlib.aclosing(events) as rest:
            with_usage = options is not None and options.include_usage
            if with_usage:
                self._unused = {"usage": None}
            yield self._chunk({"role": "assistant", "content": ""})
            event: Event | None = first
            while event is not None:
                if isinstance(event, Delta):
                    yield self._chunk({"content": event.text})
                elif isinstance(event, Finished):
                    yield self._chunk({}, event.reason)
                    if with_usage:
                        usage = _usage(event).model_dump()
                        yield {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": usage}
                event = await anext(rest, None)

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice], **self._unused}


def _usage(finished: Finished) -> schema.Usage:
    return schema.Usage(
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        total_tokens=finished.prompt_tokens + finished.completion_tokens,
        crosstrim=schema.Kept(visible=finished.visible, kept=finished.kept),
    )


async def _sse(pieces: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield f"data: {json.dumps(piece)}\n\n"
    except ClientLeftError:
        return
    except Exception as error:  # the status is sent already; the stream can only end with the error
        _, body = _described(error)
        yield f"data: {json.dumps(body)}\n\n"
        return
    yield "data: [DONE]\n\n"


async def _answer_error(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientLeftError):
        return Response(status_code=499)
    status, body = _described(error)
    headers: Mapping[str, str] | None = error.headers if isinstance(error, HTTPException) else None
    if status == 503:
        headers = RETRY
    return JSONResponse(body, status, headers)


def _described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an error: the words of those that are the client's, and none of any other."""
    if isinstance(error, RequestValidationError):
        words, path = wording.refusal(error.errors())
        return 400, schema.error(words, "invalid_request_error", param=path)
    if isinstance(error, HTTPException):
        code = "request_too_large" if error.status_code == 413 else None
        return error.status_code, schema.error(str(error.detail), "invalid_request_error", code=code)
    if isinstance(error, ContextLengthError):
        code = "context_length_exceeded"  # clients know it, and shorten the conversation
        return 400, schema.error(str(error), "invalid_request_error", param="messages", code=code)
    if isinstance(error, InputError | ConfigError):
        return 400, schema.error(str(error), "invalid_request_error")
    if isinstance(error, _NoSuchModelError):
        return 404, schema.error(str(error), "invalid_request_error", param="model", code="model_not_found")
    if isinstance(error, TimedOutError):
        return 504, schema.error("the answer took longer than this server allows.", "timeout_error", code="timeout")
    if isinstance(error, EngineError):
        return 503, schema.error(str(error), "server_error")
    _LOG.error("a request failed", exc_info=error)
    return 500, schema.error("the server failed on this request; its log says why.", "server_error")
