"""Answer trimmed, and again with more where the answer was unsure. Ours.

The vision tower does not run again: every attempt reads the same features. docs/calibration.md says what it buys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from crosstrim.asking.inputs import Inputs
from crosstrim.calibrated import CalibratedConfig
from crosstrim.config import TrimConfig
from crosstrim.errors import ConfigError
from crosstrim.trimming.report import ImageReport, TrimReport

if TYPE_CHECKING:
    from crosstrim.asking.answering import Generation

UNTRIMMED = "untrimmed"
LOSSLESS = "lossless"

Budget = float | int | str
"""What an attempt may keep: as `TrimConfig.keep`, or "lossless", or "untrimmed"."""


@dataclass(frozen=True)
class Escalation:
    """When an answer is made again, and with what.

    Attributes:
        below: an answer is unsure if one of its tokens had a lower probability than this, in (0, 1].
        rungs: how further attempts trim, in turn until one is sure; None is the untrimmed model. The last one's
            answer stands. None at all: answers only tell how sure they are.
    """

    below: float
    rungs: tuple[TrimConfig | None, ...] = (None,)

    def __str__(self) -> str:
        return f"below {self.below} again {', '.join(map(budget_of, self.rungs))}"

    def goes_on(self, attempts: Sequence[Attempt]) -> bool:
        """Whether another attempt follows these: the latest was unsure, and a rung is left."""
        return attempts[-1].lowest_probability < self.below and len(attempts) <= len(self.rungs)

    def to_dict(self) -> dict[str, Any]:
        """The escalation as plain JSON types."""
        return {"below": self.below, "rungs": [None if one is None else one.to_dict() for one in self.rungs]}

    @classmethod
    def of(cls, config: TrimConfig, below: float, to: Sequence[Budget] | Budget = UNTRIMMED) -> Escalation:
        """The escalation of a first attempt that trims as `config` says.

        Args:
            config: of the first attempt.
            below: as the attribute.
            to: what further attempts keep, least first.

        Raises:
            ConfigError: a value is out of range, an attempt would keep no more than the one before it, or the first
                attempt drops nothing.
        """
        if isinstance(below, bool) or not isinstance(below, int | float) or not 0 < below <= 1:
            raise ConfigError(f"escalate={below!r} must be a probability above 0 and at most 1.")
        if config.drops_nothing:
            raise ConfigError(
                f"escalate={below!r} has no effect on a trim that drops nothing visible; give k or keep with it."
            )
        budgets = [to] if isinstance(to, float | int | str) else list(to)
        if not budgets:
            raise ConfigError("escalate_to=[] names no further attempt; leave it out for the untrimmed model.")
        for place, budget in enumerate(budgets):
            _check_order(budgets[place - 1] if place else config.keep, budget)
        return cls(float(below), tuple(_rung(config, budget) for budget in budgets))


@dataclass(frozen=True)
class Attempt:
    """One answer on the way to the last.

    Attributes:
        budget: "k=0.25", "keep=0.1", "lossless" or "untrimmed".
        lowest_probability: of its tokens, the one that ends it included.
        visible: features that were there to keep.
        kept: features that stayed.
        tokens: of the answer, the one that ends it included.
        seconds: wall-clock time of its batch.
    """

    budget: str
    lowest_probability: float
    visible: int
    kept: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The attempt as plain JSON types."""
        rounded = {"lowest_probability": round(self.lowest_probability, 6), "seconds": round(self.seconds, 4)}
        return asdict(self) | rounded


@dataclass(frozen=True)
class Settled:
    """What became of one sample of a batch.

    Attributes:
        text: the last attempt's answer.
        tokens: [S] int64, the last attempt's, end of text and padding included.
        seconds: wall-clock time of all attempts.
        report: of the last attempt's batch, in which the sample is `place`; None where that ran untrimmed.
        place: of the sample in that batch.
        logits: [V] float32, of the last attempt's first token.
        attempts: all of them, in order; none without an escalation.
    """

    text: str
    tokens: torch.Tensor = field(repr=False)
    seconds: float
    report: TrimReport | None
    place: int
    logits: torch.Tensor = field(repr=False)
    attempts: tuple[Attempt, ...] = ()

    @property
    def images(self) -> tuple[ImageReport, ...]:
        """What stayed of each picture; none where the answer was made untrimmed."""
        return () if self.report is None else self.report.samples[self.place]


def attempts_of(
    config: TrimConfig, escalate: float | None, escalate_to: Sequence[Budget] | Budget = UNTRIMMED
) -> tuple[TrimConfig, Escalation | None]:
    """How a first attempt trims, and what follows it where it is unsure.

    Args:
        config: the options; a calibrated config knows itself what follows.
        escalate: as `Escalation.below`; None: nothing follows.
        escalate_to: as of `Escalation.of`.

    Raises:
        ConfigError: as `Escalation.of`, or `config` was calibrated, which says it all.
    """
    if isinstance(config, CalibratedConfig):
        if escalate is not None:
            raise ConfigError(
                f"escalate={escalate!r} goes with no calibrated trim, which says itself when to answer again; leave "
                "one of them out, or calibrate with it."
            )
        if config.escalate is not None:
            return config.first_attempt, Escalation(config.escalate)
    return config, None if escalate is None else Escalation.of(config, escalate, escalate_to)


def climb(
    attempt: Callable[[Inputs, TrimConfig | None], Generation],
    inputs: Inputs,
    config: TrimConfig | None,
    escalation: Escalation | None,
) -> list[Settled]:
    """Answer a batch, and those of its answers that are unsure together again, rung by rung.

    Args:
        attempt: answers a batch under a trim; where there is an escalation, with the `sureness`.
        inputs: of the batch.
        config: of the first attempt.
        escalation: what follows it; None: nothing does.

    Returns:
        One per sample.
    """
    found: dict[int, Settled] = {}
    pending = list(range(len(inputs["input_ids"])))
    for trim in (config, *(() if escalation is None else escalation.rungs)):
        made = attempt(inputs if len(pending) == len(inputs["input_ids"]) else inputs.part(pending), trim)
        for place, sample in enumerate(pending):
            before = found.get(sample)
            seconds = made.seconds + (0.0 if before is None else before.seconds)
            one = Settled(made.texts[place], made.tokens[place], seconds, made.report, place, made.logits[place])
            if escalation is not None:
                tried = () if before is None else before.attempts
                one = replace(one, attempts=(*tried, _attempt(one, trim, made, tried)))
            found[sample] = one
        if escalation is None:
            break
        pending = [one for one in pending if escalation.goes_on(found[one].attempts)]
        if not pending:
            break
    return [found[sample] for sample in sorted(found)]


def _attempt(one: Settled, trim: TrimConfig | None, made: Generation, before: Sequence[Attempt]) -> Attempt:
    visible, kept = (sum(getattr(image, name) for image in one.images) for name in ("visible", "kept"))
    if trim is None and before:
        visible = kept = before[0].visible
    lowest, tokens = made.sureness[one.place]
    return Attempt(budget_of(trim), lowest, visible, kept, tokens, made.seconds)


def budget_of(config: TrimConfig | None) -> str:
    """What results call how much a trim keeps."""
    if config is None:
        return UNTRIMMED
    if config.k is None and config.keep is None:
        return LOSSLESS if config.lossless else str(config.policy)
    return f"k={config.k}" if config.keep is None else f"keep={config.keep}"


def _rung(config: TrimConfig, budget: Budget) -> TrimConfig | None:
    if budget == UNTRIMMED:
        return None
    if budget == LOSSLESS:
        return replace(config, k=None, keep=None, policy=None, merge=False)
    if isinstance(budget, str):
        raise ConfigError(
            f"escalate_to={budget!r} must be a share such as 0.5, a number of features, {LOSSLESS!r} or "
            f"{UNTRIMMED!r}."
        )
    return replace(config, k=None, keep=budget)


def _check_order(before: Budget | None, budget: Budget) -> None:
    """Refuse an attempt after one that keeps as much; shares and numbers, and `k`, cannot be compared."""
    everything = before in (LOSSLESS, UNTRIMMED)
    if everything or (type(before) is type(budget) and not isinstance(budget, str) and budget <= before):  # type: ignore[operator]
        raise ConfigError(f"escalate_to={budget!r} keeps no more than {before!r} before it; give larger budgets.")
