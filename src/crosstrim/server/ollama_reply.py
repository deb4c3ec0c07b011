"""An answer in the shape of Ollama's API."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from crosstrim.server.chat import Delta, Event, Finished
from crosstrim.server.ollama_schema import ChatAnswer, GenerateAnswer
from crosstrim.server.wire import Kept, logprobs


def timestamp(seconds: float | None = None) -> str:
    """A moment as Ollama writes it.

    Args:
        seconds: since the epoch; None is now.
    """
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


_NOTHING = Delta("")


class OllamaReply:
    """A `replies.Reply`.

    Args:
        kind: of the answer: what /api/chat gives, or /api/generate.
        model: as the client named it.
        begun: `time.monotonic` when the request began to come in.
    """

    media_type = "application/x-ndjson"
    closing = ""

    def __init__(self, kind: type[ChatAnswer] | type[GenerateAnswer], model: str, begun: float) -> None:
        self._kind = kind
        self._model = model
        self._begun = begun

    def whole(self, answer: Delta, finished: Finished) -> dict[str, Any]:
        """The answer as one object."""
        return self._piece(answer, **self._end(finished))

    def loaded(self) -> dict[str, Any]:
        """What a request gets that asks nothing: the model is loaded."""
        return self._piece(_NOTHING, done=True, done_reason="load")

    def opening(self) -> Iterator[dict[str, Any]]:
        """Nothing."""
        yield from ()

    def pieces(self, event: Event) -> Iterator[dict[str, Any]]:
        """One object."""
        if isinstance(event, Delta):
            yield self._piece(event, done=False)
        elif isinstance(event, Finished):
            yield self._piece(_NOTHING, **self._end(event))

    def framed(self, piece: dict[str, Any]) -> str:
        """A line."""
        return f"{json.dumps(piece)}\n"

    def _piece(self, said_now: Delta, **more: Any) -> dict[str, Any]:
        text = said_now.text
        said: dict[str, Any] = {"message": {"content": text}} if self._kind is ChatAnswer else {"response": text}
        if said_now.tokens:
            said["logprobs"] = logprobs(said_now.tokens)
        piece = self._kind.model_validate({"model": self._model, "created_at": timestamp(), **said, **more})
        return piece.model_dump(exclude_none=True)

    def _end(self, finished: Finished) -> dict[str, Any]:
        return {
            "done": True,
            "done_reason": finished.reason,
            "total_duration": _nanoseconds(time.monotonic() - self._begun),
            "load_duration": 0,
            "prompt_eval_count": finished.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(finished.prompt_seconds),
            "eval_count": finished.completion_tokens,
            "eval_duration": _nanoseconds(finished.answer_seconds),
            "crosstrim": Kept.of(finished),
        }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
