"""The prompt of a request, checked before the model's thread has to do with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosstrim.asking import answering
from crosstrim.errors import ContextLengthError, InputError
from crosstrim.server.asked import Turn
from crosstrim.server.settings import MAX_IMAGES

BYTES_PER_TOKEN = 16
"""Of text, at most, for each token that the model reads; longer ones are not tokenized. Ours; English has 4."""


@dataclass(frozen=True)
class Written:
    """A request's prompt.

    Attributes:
        prompt: what the chat template made of the turns.
        urls: the addresses of the pictures, in order.
        new_tokens: that the answer may have.
    """

    prompt: str
    urls: list[str]
    new_tokens: int


class Prompts:
    """Writes prompts and counts their tokens, by any thread.

    Args:
        processor: of `crosstrim.load`.
        max_tokens: that the model reads, prompt and answer together.
    """

    def __init__(self, processor: Any, max_tokens: int) -> None:
        self._processor = processor
        self._max_tokens = max_tokens
        # A copy, for the model's thread sets padding on its own.
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        self._tokenizer.backend_tokenizer.no_padding()
        self._tokenizer.backend_tokenizer.no_truncation()
        self._image_id = self._tokenizer.convert_tokens_to_ids(processor.image_token)

    def write(
        self, turns: Sequence[Turn], new_tokens: int, *, fills: bool = False, length_field: str = "max_tokens"
    ) -> Written:
        """What the chat template makes of a conversation.

        Args:
            turns: the conversation.
            new_tokens: that the answer may have.
            fills: whether it may have fewer, if the model reads no more.
            length_field: what the client calls `new_tokens`.

        Raises:
            ContextLengthError: the model reads less.
            InputError: the turns cannot be asked.
        """
        written, urls = self._messages(turns)
        self._check_size(
            sum(len(part.get("text", "").encode()) for message in written for part in message["content"])
        )
        prompt = self._prompt(written)
        # Of many, since only that call lets other threads run meanwhile.
        (encoded,) = self._tokenizer.backend_tokenizer.encode_batch([prompt], add_special_tokens=False)
        count = len(encoded.ids)
        if encoded.ids.count(self._image_id) != len(urls):  # each part by itself was checked before
            raise InputError(f"the texts make {self._processor.image_token} together, which stands for a picture.")
        if fills:
            new_tokens = max(1, min(new_tokens, self._max_tokens - count))
        answering.check_length(self._max_tokens, count, new_tokens, option=length_field)
        return Written(prompt, urls, new_tokens)

    def _check_size(self, size: int) -> None:
        limit = self._max_tokens * BYTES_PER_TOKEN
        if size > limit:
            raise ContextLengthError(
                f"the texts have {size} bytes; the limit is {limit}, {BYTES_PER_TOKEN} for each of the "
                f"{self._max_tokens} tokens that the model reads. Shorten them."
            )

    def _messages(self, turns: Sequence[Turn]) -> tuple[list[dict[str, Any]], list[str]]:
        """The turns as the chat template wants them, and their pictures' addresses in order."""
        written: list[dict[str, Any]] = []
        urls: list[str] = []
        for turn in turns:
            parts: list[dict[str, str]] = []
            for part in turn.parts:
                if isinstance(part, str):
                    parts.append({"type": "text", "text": self._checked(part)})
                elif turn.role != "user":
                    raise InputError(f"a message of the role {turn.role!r} holds a picture; only a user's may.")
                else:
                    parts.append({"type": "image"})
                    urls.append(part.url)
            written.append({"role": turn.role, "content": parts})
        if len(urls) > MAX_IMAGES:
            raise InputError(f"the request has {len(urls)} pictures; the limit is {MAX_IMAGES}.")
        if not urls and not any(part.get("text", "").strip() for message in written for part in message["content"]):
            raise InputError("the question is empty; ask something.")
        return written, urls

    def _checked(self, text: str) -> str:
        if self._processor.image_token in text:
            raise InputError(f"the text contains {self._processor.image_token}, which stands for a picture.")
        if text.encode("utf-8", "replace").decode() != text:
            raise InputError("the text holds half a character (a lone surrogate).")
        return text

    def _prompt(self, messages: list[dict[str, Any]]) -> str:
        if self._processor.chat_template is None:
            raise InputError("this model has no chat template: it completes texts, and cannot chat.")
        from jinja2 import TemplateError

        try:
            return str(self._processor.apply_chat_template(messages, add_generation_prompt=True))
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses these messages: {error}") from error
