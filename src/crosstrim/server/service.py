"""From a checked request to its events: what the server does between the wire and the model's thread."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from crosstrim.asking.escalation import Escalation, attempts_of
from crosstrim.asking.sureness import ends_of
from crosstrim.config import TrimConfig
from crosstrim.errors import CrosstrimError, InputError
from crosstrim.models import mllama
from crosstrim.server.asked import Asked
from crosstrim.server.chat import Chat, Event, Failed, Finished
from crosstrim.server.facts import Facts
from crosstrim.server.generation import Generator
from crosstrim.server.grammar import Grammars
from crosstrim.server.metrics import Metrics
from crosstrim.server.pictures import open_pictures
from crosstrim.server.pixels import Pixels
from crosstrim.server.prompts import Prompts
from crosstrim.server.scheduler import Scheduler
from crosstrim.server.settings import DEFAULT_NEW_TOKENS, Settings
from crosstrim.server.wire import TrimOptions
from crosstrim.trimming.checks import check_calibrated

_LARGEST = 2  # requests of the largest pictures whose pictures may be decoded at once: one runs, one comes
_LOOK_UP = 0.1  # seconds between two looks whether the client is still there


class TimedOutError(Exception):
    """The request took longer than the server allows."""


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


class ModelFailedError(Exception):
    """The model raised; the cause says what."""


class Service:
    """A model at work.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        settings: how to serve it.

    Raises:
        CalibrationError: the trim was calibrated with another model.

    Attributes:
        facts: what is told of the model.
        metrics: what Prometheus is told.
        draining: whether new requests are refused, because the server is going down.
        unfinished: chat requests that were let in and have not ended.
        pixels: of the pictures that are decoded.
    """

    def __init__(self, model: Any, processor: Any, settings: Settings) -> None:
        first, _ = attempts_of(settings.trim, settings.escalate, settings.escalate_to)
        check_calibrated(model, first)
        self.facts = Facts.of(model, processor)
        self.draining = False
        self.unfinished = 0
        self.pixels = Pixels(_LARGEST * settings.max_pixels)
        self._settings = settings
        self._prompts = Prompts(processor, mllama.max_tokens(model))
        self._grammars = Grammars(processor.tokenizer, ends_of(model))
        self._generator = Generator(model, processor, settings.feature_cache_bytes)
        self._scheduler = Scheduler(self._run, settings.max_batch, settings.max_wait_ms / 1000)
        # As many as there may be requests, so that none waits while another's picture comes slowly.
        self._threads = ThreadPoolExecutor(settings.queue_limit, "crosstrim-prepare")
        self.metrics = Metrics(
            waiting=lambda: self._scheduler.waiting,
            cached_bytes=lambda: self._generator.cache.bytes,
            decoded_pixels=lambda: self.pixels.in_use,
        )

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread that owns the model; None while all is well."""
        return self._scheduler.failure

    def close(self) -> None:
        """Finish what runs and refuse what waits."""
        self.draining = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._scheduler.close()

    def _run(self, chats: Sequence[Chat]) -> None:
        self.metrics.batch_size.observe(len(chats))
        self._generator.answer(chats)

    def prepare(self, asked: Asked, tell: Callable[[Event], None], deadline: float | None = None) -> Chat:
        """Check what the schema cannot, fetch and decode the pictures, and write the prompt. May take long.

        Args:
            asked: what is asked.
            tell: takes events, from the thread that owns the model.
            deadline: `time.monotonic` when nobody waits any more; None is never.

        Raises:
            TimeoutError: the pictures could not be decoded before the deadline.
            CrosstrimError: the request cannot be answered.
        """
        config, escalation = _attempts(asked.trim, self._settings)
        wanted = asked.json_schema
        grammar = None if wanted is None else self._grammars.grammar(wanted, deadline)
        written = self._prompts.write(
            asked.turns, self._new_tokens(asked), fills=asked.fills, length_field=asked.length_field
        )
        if not written.urls:
            escalation = None  # without a picture there is nothing to trim
        return Chat(
            written.prompt,
            open_pictures(written.urls, self._settings, self.pixels, deadline),
            config,
            written.new_tokens,
            tell,
            stops=asked.stops,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            top_logprobs=asked.top_logprobs,
            grammar=grammar,
            escalation=escalation,
        )

    async def events(
        self, asked: Asked, client_left: Callable[[], Awaitable[bool]], begun: float | None = None
    ) -> AsyncGenerator[Event]:
        """Answer a request: pieces of text, then `Finished`.

        Args:
            asked: what is asked.
            client_left: whether nobody waits for the answer any more.
            begun: `time.monotonic` when the request began to come in; None is now.

        Raises:
            TimedOutError: it took too long.
            ClientLeftError: the client is gone; its row in the batch is given up.
            ModelFailedError: the model raised something of its own.
            CrosstrimError: the request cannot be answered.
        """
        begun = time.monotonic() if begun is None else begun
        deadline = begun + self._settings.timeout
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it whoever would hear this
                loop.call_soon_threadsafe(told.put_nowait, event)

        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                chat = await loop.run_in_executor(self._threads, self.prepare, asked, tell, deadline)
        except TimeoutError as error:
            raise TimedOutError from error
        self._scheduler.submit(chat)
        event: Event | None
        has_text = False
        look = time.monotonic() + _LOOK_UP
        try:
            while True:
                try:
                    event = await asyncio.wait_for(told.get(), max(0.0, min(look, deadline) - time.monotonic()))
                except TimeoutError:
                    event = None
                now = time.monotonic()
                if now >= deadline:
                    raise TimedOutError
                if now >= look:  # however fast the pieces come
                    look = now + _LOOK_UP
                    if await client_left():
                        raise ClientLeftError
                if isinstance(event, Failed):
                    raise _raised(event.error)
                if isinstance(event, Finished):
                    self._count(event)
                    yield event
                    return
                if event is not None:
                    if not has_text:
                        has_text = True
                        self.metrics.first_token.observe(now - begun)
                    yield event
        finally:
            chat.cancelled.set()
            self._scheduler.forget(chat)

    def _count(self, finished: Finished) -> None:
        self.metrics.tokens.inc(finished.completion_tokens)
        self.metrics.features.labels("visible").inc(finished.visible)
        self.metrics.features.labels("kept").inc(finished.kept)
        self.metrics.escalated.inc(len(finished.attempts) > 1)

    def _new_tokens(self, asked: Asked) -> int:
        wanted, limit = asked.new_tokens, self._settings.max_new_tokens
        if asked.fills:
            return limit
        if wanted is None:
            return min(DEFAULT_NEW_TOKENS, limit)
        if wanted > limit:
            name = asked.length_field
            raise InputError(f"{name}={wanted} is more than this server gives, {limit}; ask for at most that.")
        return wanted


def _raised(error: Exception) -> Exception:
    """An error of the model's thread, as the client's or as the server's."""
    if isinstance(error, CrosstrimError):
        return error
    failed = ModelFailedError()
    failed.__cause__ = error
    return failed


def _attempts(wanted: TrimOptions | None, settings: Settings) -> tuple[TrimConfig, Escalation | None]:
    """How the first attempt at an answer trims, and what follows it, by what the request says or the server does."""
    config = _trim_config(wanted, settings.trim)
    escalate, to = settings.escalate, settings.escalate_to
    if wanted is not None and wanted.escalate is not None:
        return attempts_of(config, wanted.escalate, wanted.escalate_to or to)
    if wanted is not None and wanted.escalate_to is not None:
        raise InputError("escalate_to goes with escalate; give that too, or leave it out.")
    # The server's own way of making answers again says nothing about a request that wants everything.
    return attempts_of(config, None if config.drops_nothing else escalate, to)


def _trim_config(wanted: TrimOptions | None, default: TrimConfig) -> TrimConfig:
    """The server's trim with what the request says in its place."""
    if wanted is None:
        return default
    values = default.to_dict()
    amounts = [wanted.k is not None, wanted.keep is not None, wanted.lossless]
    if sum(amounts) > 1:
        raise InputError("k, keep and lossless are ways to say how much stays; give one of them.")
    if any(amounts):  # and with it the policy that is the default for such an amount
        values |= {"k": wanted.k, "keep": wanted.keep, "policy": None}
    if wanted.policy is not None:
        values["policy"] = wanted.policy
    return TrimConfig.from_dict(values)
