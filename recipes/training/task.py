"""What a model is to learn: pictures, what each patch of them shows, and questions about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from . import tokenizer
from .settings import Settings
from .tiles import Picture

Drawn = TypeVar("Drawn", bound=Picture)

FIXED, JOINT = 2, 3
"""The stages that ask questions: the encoder is fixed in one and learns with the rest in the other."""


@dataclass(frozen=True)
class Question:
    """A question, its one right answer and its kind."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Head:
    """Something the vision encoder is asked while it trains: of how many classes, and what it weighs in the loss.

    Attributes:
        classes: how many answers there are.
        weight: of its loss in the sum.
        nothing: the class of patches that show nothing, which accuracy leaves out.
        words: what the first classes are in the text, one token each. Projected features learn to be like the tokens'
            embeddings, so that the language model knows what they say before it is trained.
        turned: whether they are to be like the embeddings with their halves swapped: so a feature can say two words.
    """

    classes: int
    weight: float
    nothing: int | None = None
    words: tuple[str, ...] = ()
    turned: bool = False


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
        draw: a picture of a split.
        draw_crowd: a training picture for the patches alone, densely filled, by how far the first stage has come.
        lesson: what is asked about a picture in a step of the second or third stage.
    """

    settings: Settings
    corpus: Callable[[], list[str]]
    words: int
    segment: int
    patches: Mapping[str, Head]
    whole: Mapping[str, Head]
    labels: Callable[[Drawn], dict[str, Any]]
    draw: Callable[[str, np.random.Generator], Drawn]
    draw_crowd: Callable[[np.random.Generator, float], Drawn]
    lesson: Callable[[Drawn, int, int, np.random.Generator], Sequence[Question]]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, trained on first use."""
        return tokenizer.build_tokenizer(self.corpus(), self.words)

    @property
    def speaks(self) -> bool:
        """Whether projected features are to say words in the language model's embeddings."""
        return any(head.words for head in self.patches.values())

    def token(self, word: str) -> int:
        """Return the one token of a word as it stands in a sentence, after its space; digits carry none.

        Raises:
            ValueError: The tokenizer cuts it into several.
        """
        text = word if word.isdigit() else f" {word}"
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1:
            raise ValueError(f"{word!r} is {len(tokens)} tokens, not one: the tokenizer needs more words")
        return int(tokens[0])

    @cached_property
    def prefix(self) -> list[int]:
        """The tokens that every prompt starts with, up to and including the image token."""
        tokens, _ = self.tokens("", "")
        return tokens[: tokens.index(self.tokenizer.convert_tokens_to_ids(tokenizer.IMAGE)) + 1]

    def tokens(self, question: str, answer: str) -> tuple[list[int], int]:
        """Return a question and its answer as tokens of the chat template, and where the answer starts."""
        ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = self.tokenizer.apply_chat_template(
            ask, chat_template=tokenizer.CHAT_TEMPLATE, add_generation_prompt=True, return_dict=False
        )
        ends = self.tokenizer(answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        return [*prompt, *ends], len(prompt)
