"""The routes of Ollama's API."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

import crosstrim
from crosstrim.server import ollama_schema as schema
from crosstrim.server.asked import Asked
from crosstrim.server.body import AnyTypeRoute
from crosstrim.server.gate import BEGUN, OLLAMA_CHAT, OLLAMA_GENERATE
from crosstrim.server.ollama_reply import OllamaReply, timestamp
from crosstrim.server.refusals import NoSuchModelError
from crosstrim.server.replies import answer
from crosstrim.server.service import Service
from crosstrim.server.settings import Settings

_NEVER = "9999-01-01T00:00:00Z"
_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorResponse} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}
_ASKED: dict[int | str, dict[str, Any]] = {
    **_REFUSED,
    200: {"content": {"application/x-ndjson": {}}, "description": "The answer, or its pieces in lines."},
}


def router(service: Service, settings: Settings, since: float) -> APIRouter:
    """The routes.

    Args:
        service: the model at work.
        settings: what is served.
        since: when the model was loaded, in seconds since the epoch.
    """
    routes = APIRouter(route_class=AnyTypeRoute)

    def check_model(name: str | None) -> None:
        if not settings.serves((name or "").removesuffix(schema.LATEST)):
            raise NoSuchModelError(f"there is no model {name!r} here, only {_tagged(settings.model_id)!r}.")

    async def answer_or_tell(asked: Asked | None, kind: Any, model: str, request: Request) -> Any:
        check_model(model)
        reply = OllamaReply(kind, model, request.scope.get(BEGUN, time.monotonic()))
        return reply.loaded() if asked is None else await answer(service, asked, reply, request)

    @routes.post(OLLAMA_CHAT, response_model=schema.ChatAnswer, response_model_exclude_unset=True, responses=_ASKED)
    async def chat(body: schema.ChatRequest, request: Request) -> Any:
        """Answer what was said last in a conversation."""
        return await answer_or_tell(body.asked(), schema.ChatAnswer, body.model, request)

    @routes.post(
        OLLAMA_GENERATE, response_model=schema.GenerateAnswer, response_model_exclude_unset=True, responses=_ASKED
    )
    async def generate(body: schema.GenerateRequest, request: Request) -> Any:
        """Answer one question."""
        return await answer_or_tell(body.asked(), schema.GenerateAnswer, body.model, request)

    @routes.get("/api/tags", responses={401: _REFUSED[401]})
    async def tags() -> schema.Tags:
        """The model that is served."""
        return schema.Tags(models=[schema.ModelEntry(**_entry(service, settings, since))])

    @routes.get("/api/ps", responses={401: _REFUSED[401]})
    async def running() -> schema.Running:
        """The model that is loaded, which is the one that is served."""
        facts = service.facts
        model = schema.RunningModel(
            **_entry(service, settings, since),
            expires_at=_NEVER,
            size_vram=facts.device_bytes,
            context_length=facts.max_tokens,
        )
        return schema.Running(models=[model])

    @routes.post("/api/show", responses=_REFUSED)
    async def show(body: schema.ShowRequest) -> schema.Show:
        """What is known of the model."""
        check_model(body.model or body.name)
        facts = service.facts
        return schema.Show(
            modified_at=timestamp(since),
            template=facts.chat_template,
            details=_details(service),
            model_info={
                "general.architecture": facts.architecture,
                "general.parameter_count": facts.parameters,
                f"{facts.architecture}.context_length": facts.max_tokens,
            },
            capabilities=["completion", "vision"],
            crosstrim=settings.trim.to_dict(),
        )

    @routes.get("/api/version", responses={401: _REFUSED[401]})
    async def version() -> schema.Version:
        """Of crosstrim, not of Ollama."""
        return schema.Version(version=crosstrim.__version__)

    @routes.head("/", include_in_schema=False)
    @routes.get("/", include_in_schema=False)
    async def root() -> PlainTextResponse:
        """Ollama's own command line asks here whether a server is there."""
        return PlainTextResponse("crosstrim is running")

    return routes


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else name + schema.LATEST


def _entry(service: Service, settings: Settings, since: float) -> dict[str, Any]:
    name = _tagged(settings.model_id)
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(since),
        "size": service.facts.weight_bytes,
        "digest": service.facts.digest,
        "details": _details(service),
    }


def _details(service: Service) -> schema.Details:
    facts = service.facts
    millions = facts.parameters / 1e6
    return schema.Details(
        family=facts.architecture,
        families=[facts.architecture],
        parameter_size=f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.1f}M",
        quantization_level=facts.dtype,
    )
