"""What the bodies of all APIs have in common: how strict they are, and how a request says how it is trimmed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

COLDEST = 0.001
"""Below this temperature answers are greedy: logits divided by it would overflow."""

BRANCHES = frozenset({"<one>", "<list>", "<text>", "<image_url>", "<whole>", "<share>"})
"""Of unions; pydantic puts them into the places of errors, where no client knows them."""

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
