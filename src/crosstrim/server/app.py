"""The HTTP side: routes, streams and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from fastapi.security import HTTPBearer

import crosstrim
from crosstrim.errors import EngineError
from crosstrim.server import not_served, ollama, refusals, schema
from crosstrim.server.body import BoundedRoute
from crosstrim.server.gate import CHAT, Gate
from crosstrim.server.log import HEADER, Access
from crosstrim.server.openai_reply import OpenAIReply
from crosstrim.server.refusals import NoSuchModelError
from crosstrim.server.replies import answer
from crosstrim.server.service import ClientLeftError, Service
from crosstrim.server.settings import Settings

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
    if settings.cors_origins:  # around the gate: browsers ask beforehand, without a key, and pages may read refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER, "Retry-After"],
        )
    app.add_middleware(Access)
    for kind in refusals.KNOWN:
        app.add_exception_handler(kind, _answer_error)
    # For the schema alone: the gate asks for the key, before the body is read.
    described = HTTPBearer(description="The server's API key.", auto_error=False)
    keyed = [Depends(described)] if settings.api_keys else []
    since = time.time()
    card = schema.ModelCard(id=settings.model_id, created=int(since))

    def check_model(name: str) -> None:
        if not settings.serves(name):
            raise NoSuchModelError(f"there is no model {name!r} here, only {card.id!r}.")

    @app.post(CHAT, response_model=schema.ChatCompletion, responses={**_REFUSALS, **_STREAM}, dependencies=keyed)
    async def chat(body: schema.ChatRequest, request: Request) -> Any:
        """Answer a question, about pictures or not."""
        check_model(body.model)
        reply = OpenAIReply(card.id, body.stream_options, with_logprobs=bool(body.logprobs))
        return await answer(service, body.asked(), reply, request)

    app.include_router(ollama.router(service, settings, since), dependencies=keyed)
    app.include_router(not_served.router())

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


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientLeftError):
        return Response(status_code=499)
    return refusals.of(error).response(request.scope["path"])
