"""What a model is to learn: pictures, what each patch of them shows, and questions about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from . import tokenizer
from .settings import Settings
from .tiles import Picture

Drawn = TypeVar("Drawn", bound=Picture)


class Question(Protocol):
    """A question and its one right answer."""

    text: str
    answer: str


@dataclass(frozen=True)
class Head:
    """Something the vision encoder is asked while it trains: of how many classes, and what it weighs in the loss.

    Attributes:
        classes: how many answers there are.
        weight: of its loss in the sum.
        nothing: the class of patches that show nothing, which accuracy leaves out.
    """

    classes: int
    weight: float
    nothing: int | None = None


@dataclass(frozen=True)
class Task(Generic[Drawn]):
    """A task, by the settings that it is trained with.

    Attributes:
        settings: every number.
        corpus: what the tokenizer is trained on.
        words: the tokenizer's byte alphabet and merges.
        segment: tokens of the longest question with its answer, without the shared prefix and the last end of turn.
        patches: what is asked of every patch.
        whole: what is asked of the picture, of the class feature of its first tile.
        labels: the right answers to both, arrays [MAX_TILES, patches] and single numbers, by the heads' names.
        draw_vision: the pictures of one step of the first stage.
        draw_language: the pictures of one step of the second or third stage, and several questions about each.
        draw_crowds: pictures for the patches alone, which a step of the third stage gets beside these.
        draw_validation: a picture of the validation split by its number.
    """

    settings: Settings
    corpus: Callable[[], list[str]]
    words: int
    segment: int
    patches: Mapping[str, Head]
    whole: Mapping[str, Head]
    labels: Callable[[Drawn], dict[str, Any]]
    draw_vision: Callable[[int], list[Drawn]]
    draw_language: Callable[[int, int, np.random.Generator], tuple[list[Drawn], Sequence[Sequence[Question]]]]
    draw_crowds: Callable[[np.random.Generator], list[Drawn]]
    draw_validation: Callable[[int], Drawn]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, trained on first use."""
        return tokenizer.build_tokenizer(self.corpus(), self.words)
