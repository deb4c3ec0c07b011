"""Routes that OpenAI and Ollama have and this server has not: each is refused with what to do instead."""

from __future__ import annotations

from typing import NoReturn

from fastapi import APIRouter

from crosstrim.server.refusals import NotServedError

_ONE_MODEL = (
    "this server serves the one model that it was started with, and neither fetches, changes nor deletes models: to "
    "serve another, start `crosstrim serve --model` with its Hugging Face id or folder."
)
_NO_EMBEDDINGS = "this server's model answers and makes no embeddings: ask a server of an embedding model for them."
_ROUTES = {
    "/v1/completions": "this server chats and completes no bare prompts: send the prompt as a user's message to "
    "/v1/chat/completions.",
    "/v1/responses": "this server does not speak the Responses API: send the same messages to /v1/chat/completions.",
    "/v1/embeddings": _NO_EMBEDDINGS,
    "/api/embed": _NO_EMBEDDINGS,
    "/api/embeddings": _NO_EMBEDDINGS,
    "/api/pull": _ONE_MODEL,
    "/api/push": _ONE_MODEL,
    "/api/create": _ONE_MODEL,
    "/api/copy": _ONE_MODEL,
    "/api/delete": _ONE_MODEL,
    "/api/blobs/{digest}": _ONE_MODEL,
}


def router() -> APIRouter:
    """The routes; they are in no schema, and read no body."""
    routes = APIRouter(include_in_schema=False)

    def refuse(path: str, words: str) -> None:
        async def refused() -> NoReturn:
            raise NotServedError(words)

        routes.add_api_route(path, refused, methods=["GET", "HEAD", "POST", "DELETE"], response_model=None)

    for path, words in _ROUTES.items():
        refuse(path, words)
    return routes
