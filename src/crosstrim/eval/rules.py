"""What a calibration tests: budgets, and with each a probability below which an answer is made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from crosstrim.asking.escalation import Escalation
from crosstrim.data.dataset import Item
from crosstrim.eval import metrics
from crosstrim.eval.settings import UNTRIMMED, Setting

Prediction = Mapping[str, Sequence[Any]]
"""Columns of `sweep.Answerer.records`, question by question."""


@dataclass(frozen=True)
class Rule:
    """What is tested: a budget, and the probability below which an answer is made again untrimmed; None: none is."""

    setting: Setting
    below: float | None = None

    @property
    def label(self) -> str:
        """What it is called."""
        return self.setting.label + ("" if self.below is None else f", again below {self.below}")

    def again(self, prediction: Prediction) -> list[bool]:
        """Per question that was asked under the budget, whether its answer is made again."""
        if self.below is None:
            return [False] * len(prediction["answer"])
        return [one < self.below for one in prediction["lowest_probability"]]

    def lost(self, predictions: Mapping[str, Prediction], items: Sequence[Item], loss: str) -> list[bool]:
        """Per question that was asked under the budget, whether something was lost.

        Args:
            predictions: by label, of this budget and of the untrimmed model.
            items: the questions.
            loss: what counts, one of `defaults.LOSSES`.
        """
        prediction = predictions[self.setting.label]
        pairs = zip(predictions[UNTRIMMED]["answer"], prediction["answer"], items, strict=False)
        if loss == "answer":
            lost = [untrimmed != trimmed for untrimmed, trimmed, _ in pairs]
        else:
            lost = [
                metrics.is_right(untrimmed, item.answers) and not metrics.is_right(trimmed, item.answers)
                for untrimmed, trimmed, item in pairs
            ]
        return [one and not again for one, again in zip(lost, self.again(prediction), strict=True)]


def rules_of(settings: Sequence[Setting], escalate: Sequence[float] = ()) -> tuple[Rule, ...]:
    """What is tested, in the order of the tests, which is fixed before anything is known.

    With the highest threshold every budget, the largest first, and then with the smallest budget the other
    thresholds, the highest first: each step is expected to lose no less than the one before it.

    Raises:
        ConfigError: a threshold is no probability, or a budget drops nothing.
    """
    if not escalate:
        return tuple(map(Rule, settings))
    for setting, below in product(settings, escalate):
        Escalation.of(setting.config, below)
    first, *others = sorted(set(map(float, escalate)), reverse=True)
    return (*(Rule(setting, first) for setting in settings), *(Rule(settings[-1], below) for below in others))
