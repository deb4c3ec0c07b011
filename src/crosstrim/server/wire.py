"""What the bodies of all APIs have in common: how strict they are, and how a request says how it is trimmed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from crosstrim.errors import InputError
from crosstrim.server import chat

COLDEST = 0.001
"""Below this temperature answers are greedy: logits divided by it would overflow."""

BRANCHES = frozenset({"<one>", "<list>", "<text>", "<image_url>", "<whole>", "<share>"})
"""Of unions; pydantic puts them into the places of errors, where no client knows them."""

ANY_OBJECT = {"type": "object"}
"""The schema of an answer that must be a JSON object, of which nothing else is said."""

Text = Annotated[str, Field(max_length=1_000_000)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


def one_or_list(value: Any) -> str:
    """Which branch of a union of a value and a list of them this is."""
    return "<list>" if isinstance(value, list) else "<one>"


def _whole_or_share(value: Any) -> str:
    return "<whole>" if type(value) is int else "<share>"


Stops = Annotated[
    Annotated[_Stop, Tag("<one>")] | Annotated[list[_Stop], Field(max_length=16), Tag("<list>")],
    Discriminator(one_or_list),
]


def as_tuple(stop: str | list[str] | None) -> tuple[str, ...]:
    """What ends an answer, of one text or several."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def sampling_temperature(given: float | None) -> float:
    """0 for greedy answers, which are those that ask for nothing else."""
    return given if given is not None and given >= COLDEST else 0.0


class Strict(BaseModel):
    """Fields that are not known are refused: to ignore what was asked for would be a lie."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        """Some clients send every field they know; null asks for nothing."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class InMessage(Strict):
    """Messages come from many hands, and are sent back with all that was in them; more than is known is ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Likely(BaseModel):
    """A token that could stand in one place."""

    token: str = Field(description="Half a character is written as U+FFFD.")
    logprob: float = Field(description="Of the model's own distribution, whatever is drawn or allowed.")
    bytes: list[int]

    @classmethod
    def of(cls, likely: chat.Likely) -> Self:
        """The same for the wire."""
        content = likely.content
        return cls(token=content.decode("utf-8", "replace"), logprob=likely.logprob, bytes=list(content))


class TokenLogprob(Likely):
    """A token of the answer."""

    top_logprobs: list[Likely]


def logprobs(tokens: Iterable[chat.Token]) -> list[TokenLogprob]:
    """Tokens for the wire; OpenAI and Ollama write them alike."""
    return [
        TokenLogprob(**Likely.of(token.chosen).model_dump(), top_logprobs=list(map(Likely.of, token.likeliest)))
        for token in tokens
    ]


def top_logprobs(wanted: bool | None, count: int | None) -> int | None:
    """How many of the likeliest tokens to tell in each place; None is of none, nor of the chosen.

    Raises:
        InputError: a number of them is asked for, and they are not.
    """
    if count and not wanted:
        raise InputError(f"top_logprobs={count} goes with logprobs=true; set that too, or leave it out.")
    return (count or 0) if wanted else None


def _word_or_number(value: Any) -> str:
    return "<text>" if isinstance(value, str) else _whole_or_share(value)


_Rung = Annotated[
    Annotated[Literal["untrimmed", "lossless"], Tag("<text>")]
    | Annotated[int, Field(gt=0), Tag("<whole>")]
    | Annotated[float, Field(gt=0), Tag("<share>")],
    Discriminator(_word_or_number),
]


class Attempt(BaseModel):
    """An answer on the way to the last."""

    budget: str
    lowest_probability: float = Field(description="Of its tokens.")
    visible: int
    kept: int
    tokens: int
    seconds: float


class Kept(BaseModel):
    """Image features of a request: those that could be seen, and those that stayed."""

    visible: int
    kept: int
    escalated: bool | None = Field(None, description="Whether an unsure answer was made again; where that is asked.")
    attempts: list[Attempt] | None = None

    @classmethod
    def of(cls, finished: chat.Finished) -> Self:
        """What became of a request."""
        tried = [Attempt.model_validate(one.to_dict()) for one in finished.attempts]
        escalated = len(tried) > 1 if tried else None
        return cls(visible=finished.visible, kept=finished.kept, escalated=escalated, attempts=tried or None)

    @model_serializer(mode="wrap")
    def _without_what_was_not_asked(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {name: value for name, value in written.items() if value is not None}


class TrimOptions(Strict):
    """How this request is trimmed, in place of the server's own way."""

    k: float | None = Field(None, gt=0, le=1, description="Share that every head of the first layer picks.")
    keep: (
        Annotated[
            Annotated[int, Field(gt=0), Tag("<whole>")] | Annotated[float, Field(gt=0), Tag("<share>")],
            Discriminator(_whole_or_share),
        ]
        | None
    ) = Field(None, description="Exact budget: a share, or a number of features.")
    lossless: bool = Field(False, description="Drop only padding.")
    policy: str | None = Field(None, max_length=64, description="Which features come first.")
    escalate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Make the answer again if one of its tokens had a lower probability; a stream then begins late.",
    )
    escalate_to: Annotated[list[_Rung], Field(min_length=1, max_length=8)] | None = Field(
        None, description="With what, in turn: untrimmed, lossless, a share or a number of features."
    )
