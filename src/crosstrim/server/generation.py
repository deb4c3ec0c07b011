"""One batch through the model: every row has its own end, and is told its text as it grows."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from crosstrim.asking import answering
from crosstrim.asking.batches import Encoder
from crosstrim.asking.escalation import Attempt, budget_of
from crosstrim.asking.inputs import Inputs
from crosstrim.asking.sureness import ends_of
from crosstrim.config import TrimConfig
from crosstrim.errors import InputError
from crosstrim.server.chat import Chat, Delta, DeviceLostError, Failed, Finished, Token
from crosstrim.server.decoding import Chooser, TokenTexts
from crosstrim.server.grammar import GrammarFailedError
from crosstrim.server.text import GrowingText
from crosstrim.trimming.handle import TrimHandle

_LOG = logging.getLogger(__name__)


class Generator:
    """Owns the model; to be used by one thread.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        feature_cache_bytes: kept of pictures' features.
    """

    def __init__(self, model: Any, processor: Any, feature_cache_bytes: int) -> None:
        self._model = model
        self._processor = processor
        self._ends = ends_of(model)
        self._texts = TokenTexts(processor.tokenizer)
        self._encoder = Encoder(model, processor, feature_cache_bytes)
        self.cache = self._encoder.cache

    def answer(self, chats: Sequence[Chat]) -> None:
        """Answer requests of one group together; each is told its events, and nothing is raised for a request.

        Raises:
            DeviceLostError: the device failed in a way that no further pass on it survives.
        """
        rows: list[_Row] = []
        try:
            self._generate(chats, rows)
        except torch.AcceleratorError as error:  # of CUDA; every later call in this process would fail likewise
            raise DeviceLostError from error
        except Exception as error:  # whatever the model raises is the request's, the server goes on
            traceback.clear_frames(error.__traceback__)  # which hold the failed attempt's memory
            failure = error
        else:
            return
        if len(chats) > 1 and not any(row.text.count for row in rows):
            for chat in chats:  # one of them may have spoilt it for all
                self.answer([chat])
        else:
            told = {id(row.chat) for row in rows if row.done}
            for chat in chats:
                if id(chat) not in told:
                    chat.tell(Failed(failure))

    def _generate(self, chats: Sequence[Chat], rows: list[_Row]) -> None:
        pictures = [[picture.image for picture in chat.pictures] for chat in chats]
        digests = tuple(tuple(picture.digest for picture in chat.pictures) for chat in chats)
        config, escalation = chats[0].config, chats[0].escalation
        with self._encoder.inputs(pictures, [chat.prompt for chat in chats], digests=digests) as inputs:
            lengths = inputs["attention_mask"].sum(-1).tolist()
            rows.extend(
                _Row(chat, length, self._decode, self._ends, Chooser(chat, self._model.device, self._texts))
                for chat, length in zip(chats, lengths, strict=True)
            )
            self._attempt(inputs, rows, config)
            for rung in escalation.rungs if escalation is not None else ():
                unsure = [place for place, row in enumerate(rows) if row.unsure]
                if not unsure:
                    break
                for place in unsure:
                    rows[place].begin_again(Chooser(chats[place], self._model.device, self._texts))
                self._attempt(inputs.part(unsure), [rows[place] for place in unsure], rung)

    def _attempt(self, inputs: Inputs, rows: Sequence[_Row], config: TrimConfig | None) -> None:
        """Answer rows under a trim; None leaves the model as it is."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        with (
            inputs.given(self._model),
            answering.trimmed(self._model, self._processor, config) as handle,
        ):
            for row in rows:
                row.budget = budget_of(config)
            self._model.generate(
                **inputs,
                max_new_tokens=max(row.chat.max_new_tokens for row in rows),
                do_sample=False,  # whatever the checkpoint says; each row draws by itself
                logits_processor=LogitsProcessorList([_choose(rows)]),
                stopping_criteria=StoppingCriteriaList([_Watch(rows, handle)]),
            )

    def _decode(self, tokens: list[int]) -> str:
        return str(self._processor.tokenizer.decode(tokens, skip_special_tokens=True))


class _Row:
    """One request of a running batch.

    Where unsure answers are made again, nothing of an answer is told before it is known to be the last.
    """

    def __init__(self, chat: Chat, prompt_tokens: int, decode: Any, ends: frozenset[int], chooser: Chooser) -> None:
        self.chat = chat
        self.visible = self.kept = 0
        self.budget = ""
        self._decode = decode
        self._prompt_tokens = prompt_tokens
        self._ends = ends
        self._begun = time.perf_counter()
        self._attempts: list[Attempt] = []
        self._begin(chooser)

    def _begin(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self._tokens: list[Token] = []  # that were not told yet
        self._held: list[Delta] = []
        self._lowest = 1.0
        self._first: float | None = None  # when the first token came
        self._attempted = time.perf_counter()
        self.text = GrowingText(self._decode, self.chat.stops)
        self.done = self.unsure = False

    def begin_again(self, chooser: Chooser) -> None:
        """Forget the answer, which was unsure."""
        if self.chat.grammar is not None:
            self.chat.grammar.begin_again()
        self._begin(chooser)

    def choose(self, logits: torch.Tensor) -> None:
        """Leave what may come next of a row's logits, (vocabulary,); changed in place."""
        try:
            self._chooser.choose(logits)
        except GrammarFailedError as error:
            self._fail(error)

    def add(self, token: int) -> None:
        """Take in a token, and tell what is new."""
        if self.done:
            return
        if self._first is None:
            self._first = time.perf_counter()
        if self.chat.cancelled.is_set():
            self.done = True
            return
        if self.chat.escalation is not None:
            self._lowest = min(self._lowest, self._chooser.probability(token))
        if token not in self._ends:
            try:
                self._tokens += self._chooser.take(token)
            except GrammarFailedError as error:
                return self._fail(error)
        self._tell_text(self.text.add(token))
        if token in self._ends or self.text.stopped:
            self._finish("stop")
        elif self.text.count >= self.chat.max_new_tokens:
            self._finish("length")

    def _fail(self, error: GrammarFailedError) -> None:
        """End this row alone."""
        _LOG.warning("an answer could not be held to its JSON schema: %s", error)
        self.done = True
        self.chat.tell(Failed(InputError("the answer could not be held to the JSON schema; make that simpler.")))

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self.done = True
        now, escalation = time.perf_counter(), self.chat.escalation
        if escalation is not None:
            counts = (self.visible, self.kept, self.text.count)
            self._attempts.append(Attempt(self.budget, self._lowest, *counts, now - self._attempted))
            self.unsure = escalation.goes_on(self._attempts)
            if self.unsure:
                return
        self._tell_text(self.text.finish(), last=True)
        for piece in self._held:
            self.chat.tell(piece)
        first = self._first or self._begun
        self.chat.tell(
            Finished(
                reason,
                self._prompt_tokens,
                self.text.count,
                self.visible,
                self.kept,
                prompt_seconds=first - self._begun,
                answer_seconds=now - first,
                attempts=tuple(self._attempts),
            )
        )

    def _tell_text(self, text: str, *, last: bool = False) -> None:
        if text or (last and self._tokens):
            piece = Delta(text, tuple(self._tokens))
            self._tokens.clear()
            if self.chat.escalation is None:
                self.chat.tell(piece)
            else:
                self._held.append(piece)


class _Watch:
    """Called by `generate` after every step, for which it is a stopping criterion: says which rows are done."""

    def __init__(self, rows: Sequence[_Row], handle: TrimHandle | None) -> None:
        self._rows = rows
        self._handle = handle
        self._first = True

    def __call__(self, tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._first:
            self._first = False
            samples = self._handle.report().samples if self._handle is not None else ()
            for row, images in zip(self._rows, samples, strict=False):  # none without pictures
                row.visible = sum(image.visible for image in images)
                row.kept = sum(image.kept for image in images)
            if self._handle is None:  # after an attempt that told what is visible
                for row in self._rows:
                    row.kept = row.visible
        for row, token in zip(self._rows, tokens[:, -1].tolist(), strict=True):
            row.add(token)
        return torch.tensor([row.done for row in self._rows], device=tokens.device)


def _choose(rows: Sequence[_Row]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What `generate` calls before it takes each row's likeliest token, for which it is a processor of logits."""

    def choose(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        for row, of_row in zip(rows, logits, strict=True):
            if not row.done:
                row.choose(of_row)
        return logits

    return choose
