"""What the playground runs, and what it remembers of it. There is no page in here."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from PIL import Image

from crosstrim.asking import images
from crosstrim.asking import overlay as viz
from crosstrim.asking.answering import WARM_UP, Answer
from crosstrim.asking.features import FeatureCache
from crosstrim.asking.heat import heat
from crosstrim.asking.session import Session
from crosstrim.config import TrimConfig
from crosstrim.errors import ConfigError
from crosstrim.models.tiles import Tiling
from crosstrim.play.visitor import SupersededError, Wish
from crosstrim.trimming.report import TrimReport

if TYPE_CHECKING:
    import torch

    from crosstrim.method.policies import Evidence

KNOBS = ("keep", "k")
"""The two ways to say how much stays."""

PER_CENTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 75, 100)
"""The budgets over which a question is drawn."""

_REMEMBERED = 1000  # results, the largest of which holds thousands of indices
_SHOWN = 1200  # pixels along the longer side of what is sent to the browser

Result = TypeVar("Result")


@dataclass(frozen=True)
class Subject:
    """A picture that can be asked about.

    Attributes:
        picture: as the model is to see it.
        session: questions about it, and the conversation.
        tiling: how the processor laid it out.
    """

    picture: Image.Image
    session: Session
    tiling: Tiling

    def shown(self) -> Image.Image:
        """The picture in the size in which it is shown."""
        return _shrunk(self.picture)


@dataclass(frozen=True)
class Comparison:
    """One question, answered by the trimmed and by the untrimmed model."""

    trimmed: Answer
    untrimmed: Answer

    @property
    def same(self) -> bool:
        """Whether both say the same."""
        return self.trimmed.answer == self.untrimmed.answer

    @property
    def report(self) -> TrimReport:
        """What was kept."""
        return cast(TrimReport, self.trimmed.report)


@dataclass(frozen=True)
class Point:
    """A question at one of several budgets, of which the knob is at `per_cent`."""

    per_cent: int
    comparison: Comparison


def config_of(knob: str, per_cent: float, policy: str | None) -> TrimConfig:
    """The trim that the page's controls ask for.

    Args:
        knob: of `KNOBS`.
        per_cent: what it is set to, above 0 and at most 100.
        policy: a policy's name; None takes what goes with the knob.

    Raises:
        ConfigError: one of them is out of range or unknown.
    """
    if knob not in KNOBS:
        raise ConfigError(f"{knob!r} does not say how much stays; choose one of {', '.join(KNOBS)}.")
    return TrimConfig.from_dict({knob: per_cent / 100, "policy": policy})


class Playground:
    """A loaded model, and the answers that it gave.

    One thread runs the model, wish after wish in the order in which they were made; those that were superseded
    meanwhile are skipped, and one that is being answered ends at its next token. Pictures are encoded once, and each
    question is answered once per trim, for all visitors.
    """

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int = 64) -> None:
        """Take over a model.

        Args:
            model: of `crosstrim.load`, not trimmed; nobody else generates with it.
            processor: of `crosstrim.load`.
            max_new_tokens: where answers are cut off.
        """
        self._model, self._processor = model, processor
        self._max_new_tokens = max_new_tokens
        self._features = FeatureCache()
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._results_lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="crosstrim-play")
        self._closed = threading.Event()
        self._is_warm = False

    def close(self) -> None:
        """End what is running, and begin nothing more."""
        self._closed.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def open(self, path: str | os.PathLike[str]) -> Subject:
        """Read a picture, under the limits of `crosstrim ask`.

        Raises:
            InputError: it cannot be used; the message names the file without its folder.
        """
        file = io.BytesIO(Path(path).read_bytes())
        file.name = Path(path).name
        picture = images.open_image(file)
        viz.check_size(picture.size)
        session = Session(self._model, self._processor, picture, cache=self._features)
        patch = self._model.config.vision_config.patch_size
        return Subject(picture, session, Tiling.of(picture.size, self._processor.image_processor, patch))

    def compare(self, subject: Subject, question: str, config: TrimConfig, wish: Wish) -> Comparison:
        """Ask the trimmed and the untrimmed model.

        Neither time includes the vision tower, which runs before.

        Raises:
            InputError: the question cannot be asked.
            SupersededError: the visitor wished for something else meanwhile.
        """
        session, about = subject.session, (subject.session.digests, question)

        def ask(config: TrimConfig | None) -> Answer:
            def work(stop: Callable[[], bool]) -> Answer:
                session.encode()
                self._warm_up(session, question)
                if config is None:
                    return session.ask_untrimmed(question, max_new_tokens=self._max_new_tokens, stop=stop)
                return session.ask(question, max_new_tokens=self._max_new_tokens, config=config, stop=stop)

            return self._once((*about, config), wish, work)

        return Comparison(trimmed=ask(config), untrimmed=ask(None))

    def sweep(
        self, subject: Subject, question: str, knob: str, policy: str | None, wish: Wish
    ) -> Iterator[tuple[Point, ...]]:
        """Ask at every budget of `PER_CENTS`, and give what is known each time that there is more.

        Raises:
            ConfigError, InputError, SupersededError: as `config_of` and `compare`.
        """
        points: tuple[Point, ...] = ()
        for per_cent in PER_CENTS:
            config = config_of(knob, per_cent, policy)
            points += (Point(per_cent, self.compare(subject, question, config, wish)),)
            yield points

    def chat(self, subject: Subject, question: str, config: TrimConfig, wish: Wish) -> Answer:
        """The next turn of the conversation about the picture.

        Raises:
            InputError: the question cannot be asked, or the conversation has become too long.
            SupersededError: the conversation was ended meanwhile.
        """

        def work(stop: Callable[[], bool]) -> Answer:
            return subject.session.chat(question, max_new_tokens=self._max_new_tokens, config=config, stop=stop)

        return self._run(wish, work)

    def forget(self, subject: Subject) -> None:
        """End the conversation, after whatever turn is running."""
        self._worker.submit(subject.session.forget).result()

    def overlay(self, subject: Subject, comparison: Comparison) -> Image.Image:
        """The picture, of which only what was kept has its colours."""
        kept = comparison.report.samples[0][0]
        return _shrunk(viz.overlay(subject.picture, kept, subject.tiling, legend=False))

    def legend(self, subject: Subject, comparison: Comparison) -> str:
        """How many patches and class tokens were kept."""
        return viz.legend_text(comparison.report.samples[0][0].kept_indices, subject.tiling)

    def heat(self, subject: Subject, question: str, wish: Wish) -> Image.Image:
        """The picture under a map of what the question looks at in the first cross-attention layer.

        Raises:
            InputError: the question cannot be asked.
            SupersededError: the visitor wished for something else meanwhile.
        """

        def work(_stop: Callable[[], bool]) -> torch.Tensor:
            seen: list[torch.Tensor] = []

            def watch(evidence: Evidence) -> torch.Tensor:
                seen.append(evidence.saliency[0].mean(0).cpu())
                return evidence.saliency

            subject.session.ask(question, max_new_tokens=1, config=TrimConfig(keep=1.0, policy=watch))
            return seen[0]

        saliency = self._once((subject.session.digests, question, "heat"), wish, work)
        return heat(subject.shown(), saliency, subject.tiling)

    def _warm_up(self, session: Session, question: str) -> None:
        """Before the first answer: first passes are slower, and times are to be compared."""
        if not self._is_warm:
            session.ask(question, max_new_tokens=WARM_UP)
            session.ask_untrimmed(question, max_new_tokens=WARM_UP)
            self._is_warm = True

    def _once(self, key: Hashable, wish: Wish, work: Callable[[Callable[[], bool]], Result]) -> Result:
        """What `work` gives, or gave when it ran for the same key."""

        def remembered(stop: Callable[[], bool]) -> Result:
            if (found := self._find(key)) is not None:  # while this one waited
                return cast(Result, found)
            result = work(stop)
            if not stop():  # otherwise it may be half an answer
                with self._results_lock:
                    self._results[key] = result
                    if len(self._results) > _REMEMBERED:
                        self._results.popitem(last=False)
            return result

        found = self._find(key)
        return self._run(wish, remembered) if found is None else cast(Result, found)

    def _find(self, key: Hashable) -> Any:
        with self._results_lock:
            if key in self._results:
                self._results.move_to_end(key)
            return self._results.get(key)

    def _run(self, wish: Wish, work: Callable[[Callable[[], bool]], Result]) -> Result:
        """What `work` gives once the model is free; it is told whether to stop."""

        def stop() -> bool:
            return wish.is_superseded() or self._closed.is_set()

        def unless_superseded() -> Result:
            if stop():
                raise SupersededError
            return work(stop)

        if stop():  # also because nothing can be submitted once it is closed
            raise SupersededError
        try:
            result = self._worker.submit(unless_superseded).result()
        except CancelledError as error:
            raise SupersededError from error
        if stop():
            raise SupersededError
        return result


def _shrunk(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((_SHOWN, _SHOWN))
    return small
