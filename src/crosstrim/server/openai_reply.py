"""An answer in the shape of OpenAI's chat completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from crosstrim.server import schema, wire
from crosstrim.server.chat import Delta, Event, Finished


class OpenAIReply:
    """A `replies.Reply`.

    Args:
        model: what the client is told it is called.
        options: of a stream.
        with_logprobs: whether to tell how likely tokens were.
    """

    media_type = "text/event-stream"
    closing = "data: [DONE]\n\n"

    def __init__(self, model: str, options: schema.StreamOptions | None, *, with_logprobs: bool) -> None:
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._with_logprobs = with_logprobs
        self._with_usage = options is not None and options.include_usage
        # The usage in all but the last chunk, where it is asked for.
        self._unused: dict[str, None] = {"usage": None} if self._with_usage else {}

    def whole(self, answer: Delta, finished: Finished) -> schema.ChatCompletion:
        """A `chat.completion`."""
        choice = schema.Choice(
            message=schema.AnswerMessage(content=answer.text),
            finish_reason=finished.reason,
            logprobs=self._logprobs(answer),
        )
        return schema.ChatCompletion(**self._common, choices=[choice], usage=_usage(finished))

    def opening(self) -> Iterator[dict[str, Any]]:
        """Who speaks."""
        yield self._chunk({"role": "assistant", "content": ""})

    def pieces(self, event: Event) -> Iterator[dict[str, Any]]:
        """A `chat.completion.chunk` or two."""
        if isinstance(event, Delta):
            yield self._chunk({"content": event.text}, logprobs=self._logprobs(event))
        elif isinstance(event, Finished):
            yield self._chunk({}, event.reason)
            if self._with_usage:
                usage = _usage(event).model_dump()
                yield {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def framed(self, piece: dict[str, Any]) -> str:
        """A server-sent event."""
        return f"data: {json.dumps(piece)}\n\n"

    def _logprobs(self, piece: Delta) -> schema.ChoiceLogprobs | None:
        return schema.ChoiceLogprobs(content=wire.logprobs(piece.tokens)) if self._with_logprobs else None

    def _chunk(
        self, delta: dict[str, str], reason: str | None = None, logprobs: schema.ChoiceLogprobs | None = None
    ) -> dict[str, Any]:
        told = None if logprobs is None else logprobs.model_dump()
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": told}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice], **self._unused}


def _usage(finished: Finished) -> schema.Usage:
    return schema.Usage(
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        total_tokens=finished.prompt_tokens + finished.completion_tokens,
        crosstrim=wire.Kept.of(finished),
    )
