"""What is answered instead of an answer: every error as one `Refusal`, in the shape that its client's API has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from crosstrim.errors import (
    ConfigError,
    ContextLengthError,
    CrosstrimError,
    EngineError,
    InputError,
    MissingExtraError,
)
from crosstrim.server import wording
from crosstrim.server.service import ClientLeftError, ModelFailedError, TimedOutError

_LOG = logging.getLogger(__name__)

RETRY = {"Retry-After": "1"}
"""The header of refusals that need not stay so."""


class NoSuchModelError(Exception):
    """The request names a model that is not served."""


class NotServedError(Exception):
    """The API has this, and the server has not; the message says what to do instead."""


KNOWN = (
    CrosstrimError,
    HTTPException,
    RequestValidationError,
    ClientLeftError,
    ModelFailedError,
    TimedOutError,
    NoSuchModelError,
    NotServedError,
)
"""Errors that `of` has words for."""


@dataclass(frozen=True)
class Refusal:
    """An error as a client is told it.

    Attributes:
        status: of HTTP.
        words: what went wrong, and what to do.
        kind: OpenAI's `type`.
        param: the field that is to blame, by its path.
        code: a word for programs.
        headers: that go with it.
    """

    status: int
    words: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self, path: str) -> dict[str, Any]:
        """The error as plain JSON types.

        Args:
            path: of the request; Ollama's begin with /api, and its errors are a text.
        """
        if speaks_ollama(path):
            return {"error": self.words}
        return {"error": {"message": self.words, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> JSONResponse:
        """The whole answer to a request of this path."""
        return JSONResponse(self.body(path), self.status, self.headers)


FAILED = Refusal(500, "the server failed on this request; its log says why.", "server_error")
"""For what is the server's own fault, of which no client is told more."""


def speaks_ollama(path: str) -> bool:
    """Whether who asks for this path speaks Ollama's API."""
    return path == "/api" or path.startswith("/api/")


def of(error: Exception) -> Refusal:
    """An error as a refusal: the words of those that are the client's, and none of any other, which are logged."""
    if isinstance(error, RequestValidationError):
        words, path = wording.refusal(error.errors())
        return Refusal(400, words, param=path)
    if isinstance(error, HTTPException):
        code = "request_too_large" if error.status_code == 413 else None
        return Refusal(error.status_code, str(error.detail), code=code, headers=error.headers or {})
    if isinstance(error, ContextLengthError):  # clients know the code, and shorten the conversation
        return Refusal(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, InputError | ConfigError | MissingExtraError):
        return Refusal(400, str(error))
    if isinstance(error, NoSuchModelError):
        return Refusal(404, str(error), param="model", code="model_not_found")
    if isinstance(error, NotServedError):
        return Refusal(404, str(error), code="not_served")
    if isinstance(error, TimedOutError):
        return Refusal(504, "the answer took longer than this server allows.", "timeout_error", code="timeout")
    if isinstance(error, EngineError):
        return Refusal(503, str(error), "server_error", headers=RETRY)
    _LOG.error("a request failed", exc_info=error)
    return FAILED
