"""A request on its way through the model, and what it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

from crosstrim.asking.escalation import Attempt, Escalation
from crosstrim.config import TrimConfig
from crosstrim.server.grammar import Grammar
from crosstrim.server.pictures import Picture


class DeviceLostError(Exception):
    """The device works no more for this process; the cause says why. The thread that owns the model ends with it."""


@dataclass(frozen=True)
class Likely:
    """A token that could stand in one place.

    Attributes:
        content: its bytes; of a part of a character only that part.
        logprob: natural logarithm of its probability as the model gives it, whatever is drawn or allowed.
    """

    content: bytes
    logprob: float


@dataclass(frozen=True)
class Token:
    """A token of the answer.

    Attributes:
        chosen: the token.
        likeliest: those that the model found likeliest there, as many as were asked for.
    """

    chosen: Likely
    likeliest: tuple[Likely, ...]


@dataclass(frozen=True)
class Delta:
    """A piece of the answer.

    Attributes:
        text: that became final.
        tokens: generated since the last piece, where they are asked for; their text may be final only later.
    """

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The answer is whole.

    Attributes:
        reason: "stop" at the end of the text or a stop string, "length" where it was cut off.
        prompt_tokens: of the prompt; a picture is one.
        completion_tokens: that were generated, the end of the text included.
        visible: image features that could be seen.
        kept: image features that stayed.
        prompt_seconds: until the first token, of the whole batch's prompts, pictures included.
        answer_seconds: from the first token to the last.
        attempts: where unsure answers are made again, each in order; the answer is the last one's.
    """

    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    visible: int
    kept: int
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event = Delta | Finished | Failed


@dataclass(eq=False)
class Chat:
    """A request, ready for the model.

    Attributes:
        prompt: what the chat template wrote.
        pictures: as many as the prompt has image tokens.
        config: how to trim.
        max_new_tokens: where to cut off.
        tell: takes events, from the thread that owns the model.
        stops: strings that end the answer.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling.
        seed: of sampling; None draws one.
        top_logprobs: how many of the likeliest tokens to tell in each place; None tells of none, nor of the chosen.
        grammar: what may be said; None is anything.
        escalation: when the answer is made again; None: it is not. Until it is known to be the last, nothing of it is
            told.
        cancelled: set when nobody waits for the answer any more.
        arrived: `time.monotonic` of its arrival.
    """

    prompt: str
    pictures: tuple[Picture, ...]
    config: TrimConfig
    max_new_tokens: int
    tell: Callable[[Event], None]
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    escalation: Escalation | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def group(self) -> Hashable:
        """Requests of equal groups may run together."""
        return self.config, self.escalation, len(self.pictures)
