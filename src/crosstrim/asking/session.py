"""One picture, many questions: the vision features are encoded once and trimmed anew for every question."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakKeyDictionary

from torch import nn

from crosstrim.asking import answering
from crosstrim.asking.escalation import UNTRIMMED, Budget, attempts_of
from crosstrim.asking.features import FeatureCache, digests
from crosstrim.asking.inputs import Inputs
from crosstrim.config import TrimConfig, TrimOptions, resolve
from crosstrim.errors import AlreadyTrimmedError, ConfigError, InputError
from crosstrim.models import mllama, prompts
from crosstrim.trimming.handle import handle_on

if TYPE_CHECKING:
    import torch
    from PIL import Image

    Picture = Image.Image | str | os.PathLike[str]

# Sessions of one model take turns: each puts its own trim on the model while it answers.
_locks: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_locks_lock = threading.Lock()

_CALL = "Session(model, processor, images"  # what an error about options shows


class Session:
    """Questions about the same picture or pictures, greedily decoded.

    The vision tower, most of the work of a short answer, runs for the first question alone. Every question is
    answered from all of the features: what an earlier one dropped comes back. An answer is that of `generate` on
    the whole prompt under `trim` with the same options.

    The trim is on the model only while a question is answered, and nothing else may generate on it meanwhile in
    another thread. Sessions themselves wait for each other.

    Attributes:
        config: how to trim, where a question does not say.
        escalation: when to answer again a question that does not say; None where no answer is made again.
        cache: where the features are held.
        digests: what tells its pictures from others.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        images: Picture | Sequence[Picture],
        config: TrimConfig | None = None,
        *,
        cache: FeatureCache | None = None,
        escalate: float | None = None,
        escalate_to: Sequence[Budget] | Budget = UNTRIMMED,
        **options: Unpack[TrimOptions],
    ) -> None:
        """Prepare the pictures; they are encoded with the first question.

        Args:
            model: of `crosstrim.load`; not trimmed.
            processor: of `crosstrim.load`.
            images: one picture or several, in the order in which the conversation opens with them: PIL images, or
                paths of files.
            config: the options as a `TrimConfig`.
            cache: a store to share with other sessions. None makes one for this session.
            escalate: an answer one of whose tokens had a lower probability than this is made again, from the same
                features; None: none is.
            escalate_to: what it is made again with: "untrimmed", "lossless", a budget as `keep`, or several in turn.
            **options: the fields of `TrimConfig` instead. No k and no keep is the lossless tier.

        Raises:
            AlreadyTrimmedError: the model is trimmed.
            ConfigError: an option is out of range or unknown, or both `config` and options are given.
            InputError: a picture cannot be used, or there is none.
            UnsupportedModelError: the model has no cross-attention layers that crosstrim knows.
        """
        config = resolve(config, options, _CALL)
        self._located = mllama.locate(model).model
        self._model, self._processor = model, processor
        config = answering.for_tokenizer(config, processor.tokenizer)
        self.config, self.escalation = attempts_of(config, escalate, escalate_to)
        self.cache = FeatureCache() if cache is None else cache
        self._refuse_trimmed()
        self._images = _prepare(processor, images)
        self.digests = digests(self._images)
        self._turns: list[answering.Turn] = []
        self._speaking = threading.Lock()  # a turn is asked and remembered before the next one is asked

    def __repr__(self) -> str:
        pictures = self._images["aspect_ratio_mask"].shape[1]
        return f"<Session on {pictures} pictures, {len(self._turns)} turns: {self.config}>"

    @property
    def turns(self) -> tuple[answering.Turn, ...]:
        """The conversation so far: questions of `chat` and their answers."""
        return tuple(self._turns)

    def forget(self) -> None:
        """Begin the conversation anew, with the same pictures."""
        self._turns.clear()

    def encode(self) -> None:
        """Encode the pictures now, and not with the first question.

        Raises:
            AlreadyTrimmedError: the model was trimmed since the session was made.
        """
        with _lock_of(self._located):
            self._refuse_trimmed()
            self._features()

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 64,
        config: TrimConfig | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> answering.Answer:
        """Answer a question on its own; the conversation stays as it is.

        Args:
            question: what to ask.
            max_new_tokens: where to cut the answer off.
            config: how to trim for this question, whose answer is then made once; None does as the session does.
            stop: asked after every token; the answer ends there where it says True.

        Returns:
            The answer and the report of its trim. Its time includes the vision tower where it had to run.

        Raises:
            AlreadyTrimmedError: the model was trimmed since the session was made.
            ConfigError: `max_new_tokens` is below 1, or `config` no `TrimConfig`.
            InputError: the question is no text, empty, names an image token, or does not fit into the model with
                its answer.
        """
        return self._answer(question, (), max_new_tokens, self._config(config), stop)

    def ask_untrimmed(
        self, question: str, *, max_new_tokens: int = 64, stop: Callable[[], bool] | None = None
    ) -> answering.Answer:
        """Answer a question by the model as it is, from the same features; the conversation stays as it is.

        Args and raises as `ask`; the answer has no report.
        """
        return self._answer(question, (), max_new_tokens, None, stop)

    def chat(
        self,
        question: str,
        *,
        max_new_tokens: int = 64,
        config: TrimConfig | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> answering.Answer:
        """Answer a question as the next turn of the conversation, and remember both.

        The whole conversation runs again, from all features, and must fit into the model; `forget` begins anew. With
        `rating_rows="all"`, the default as everywhere, its earlier turns rate beside the question: a follow-up ("and
        left of it?") leans on them. With "last_turn" the question alone rates.

        Args, returns and raises as `ask`; InputError also for a second turn without a chat template.
        """
        with self._speaking:
            answer = self._answer(question, self._turns, max_new_tokens, self._config(config), stop)
            self._turns.append((question, answer.answer))
            return answer

    def _answer(
        self,
        question: str,
        turns: Sequence[answering.Turn],
        max_new_tokens: int,
        config: TrimConfig | None,
        stop: Callable[[], bool] | None,
    ) -> answering.Answer:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens!r} must be at least 1.")
        images = self._images["aspect_ratio_ids"].shape[1]
        prompt = answering.chat_prompt(self._processor, question, images, turns)
        inputs = prompts.text_inputs(self._processor, prompt, self._images["aspect_ratio_mask"]) | self._images
        answering.check_inputs(self._model, inputs, max_new_tokens)
        with _lock_of(self._located):
            self._refuse_trimmed()
            begun = time.perf_counter()
            made = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
            escalation = self.escalation if config is self.config else None
            answer = answering.answer(
                self._model,
                self._processor,
                Inputs(made, self._features()),
                config,
                max_new_tokens,
                escalation,
                stop,
            )
            return replace(answer, seconds=time.perf_counter() - begun)

    def _config(self, config: TrimConfig | None) -> TrimConfig:
        if config is None:
            return self.config
        return answering.for_tokenizer(resolve(config, {}, _CALL), self._processor.tokenizer)

    def _features(self) -> torch.Tensor:
        return self.cache.features(self._model, self._images, self.digests)

    def _refuse_trimmed(self) -> None:
        if (handle := handle_on(self._located)) is not None:
            raise AlreadyTrimmedError(
                f"this {type(self._model).__name__} is trimmed already, but a session trims for each question "
                "itself; call remove() on the handle that trim() returned, and give the session its config.",
                handle,
            )


def _lock_of(model: nn.Module) -> threading.Lock:
    with _locks_lock:
        return _locks.setdefault(model, threading.Lock())


def _prepare(processor: Any, images: Any) -> Any:
    """The pictures as the processor gives them to the model."""
    from PIL import Image

    from crosstrim.asking.images import open_image

    several = images if isinstance(images, list | tuple) else [images]
    if not several:
        raise InputError("a session needs a picture; none was given.")
    for one in several:
        if not isinstance(one, Image.Image | str | os.PathLike) and not hasattr(one, "read"):
            raise InputError(
                f"a picture must be a PIL image, a path or a file, not a {type(one).__name__}; "
                "PIL.Image.fromarray makes one of an array."
            )
    pictures = [one if isinstance(one, Image.Image) else open_image(one) for one in several]
    try:
        return prompts.image_inputs(processor, pictures)
    except (OSError, ValueError) as error:  # Pillow reads a picture only now
        raise InputError(f"a picture cannot be used: {error}.") from error
