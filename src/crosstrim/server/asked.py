"""What a client asks, whichever API it speaks: the one thing that every route hands to the model's side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crosstrim.server.wire import TrimOptions


@dataclass(frozen=True)
class PictureAt:
    """A picture in a turn.

    Attributes:
        url: a data: URI, or a web address.
    """

    url: str


@dataclass(frozen=True)
class Turn:
    """What one side said.

    Attributes:
        role: "system", "user" or "assistant".
        parts: texts and pictures, in order.
    """

    role: str
    parts: tuple[str | PictureAt, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, as the model's side reads it.

    Attributes:
        turns: the conversation.
        new_tokens: where to cut the answer off; None leaves it to the server.
        fills: whether the answer may be as long as the server gives and the model still reads, without a refusal
            where that is little; then `new_tokens` says nothing.
        length_field: what the client's API calls `new_tokens`, for refusals.
        trim: how to trim, in place of the server's own way.
        stops: strings that end the answer.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling.
        seed: of sampling; None draws one.
        top_logprobs: how many of the likeliest tokens to tell in each place; None tells of none, nor of the chosen.
        json_schema: what the answer must meet; None is nothing.
        stream: whether the answer is wanted in pieces.
    """

    turns: tuple[Turn, ...]
    new_tokens: int | None
    length_field: str
    fills: bool = False
    trim: TrimOptions | None = None
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    stream: bool = False
