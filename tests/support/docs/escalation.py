"""What making unsure answers again brings on mini, as the section of docs/calibration.md between its marks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recipes.per_request import auc

from tests.support.docs import pages

RESULTS = {
    "held out": "evaluation/results/mini-escalation.json",
    "unlike its training": "evaluation/results/mini-escalation-unseen.json",
}
KEEPS = (0.5, 0.35, 0.2, 0.1, 0.05)
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
BELOW, KEEP = 0.9, 0.1

_PART = """\
Measured on mini's {count} held-out questions and on {unseen} questions about
[pictures unlike its training](evaluation.md#on-pictures-unlike-its-training), under `contribution`, greedy, every
answer and its lowest token probability in [mini-escalation.json](../{heldout}) and
[mini-escalation-unseen.json](../{strange}). *Again* is the share of answers that were made again untrimmed, because
one of their tokens had a probability below {below}; *kept* is the mean share of the visible features, where an
answer that is made again counts both attempts; *changed* answers are not the untrimmed model's. In per cent.

{table}

The threshold decides, at keep={keep}:

{thresholds}

*AUC* is the chance that an answer that trimming changed had a lower lowest probability than one that it did not
change: {aucs}. It is not only that some kinds of question are harder: among "read" questions alone, held out and at
keep={keep}, it is {kind}.

At about the same mean, keep={keep} with answers made again changes {same}.
"""

EQUAL = {"held out": 0.2, "unlike its training": 0.35}
"""The fixed budgets that keep about as much as `KEEP` with answers made again."""


def committed(name: str) -> dict[str, Any]:
    """A result that is kept in the repository."""
    found: dict[str, Any] = json.loads(pages.text(RESULTS[name]))
    return found


class Measured:
    """One of the results, question by question."""

    def __init__(self, name: str) -> None:
        found = committed(name)
        self.predictions = found["predictions"]
        self.visible = np.array([item["visible"] for item in found["items"]])
        self.kinds = np.array([item["kind"] for item in found["items"]])
        self.count = len(self.visible)

    def changed(self, label: str) -> NDArray[np.bool_]:
        untrimmed = self.predictions["untrimmed"]["answer"]
        return np.array(self.predictions[label]["answer"]) != np.array(untrimmed)

    def sure(self, keep: float) -> NDArray[np.float64]:
        return np.array(self.predictions[label_of(keep)]["lowest_probability"])

    def kept(self, label: str) -> NDArray[np.float64]:
        return np.array(self.predictions[label]["kept"]) / self.visible

    def again(self, keep: float, below: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
        """Which answers a threshold makes again, which differ in the end, and what was kept, from first attempts."""
        unsure = self.sure(keep) < below
        plain = label_of(keep)
        return unsure, self.changed(plain) & ~unsure, self.kept(plain) + unsure


def label_of(keep: float, again: bool = False) -> str:
    return f"contribution keep={keep}" + f", below {BELOW} again untrimmed" * again


def part() -> str:
    """The section, from the committed results."""
    measured = {name: Measured(name) for name in RESULTS}
    header = ("", *(f"{field}, {name}" for name in RESULTS for field in ("again", "kept", "changed")))
    lines = []
    for keep in KEEPS:
        for again in (False, True):
            cells = [f"keep={keep}" + f", again below {BELOW}" * again]
            for one in measured.values():
                label = label_of(keep, again)
                unsure = np.array(one.predictions[label]["escalated"]) if again else np.zeros(1)
                numbers = (unsure.mean(), one.kept(label).mean(), one.changed(label).mean())
                cells += [_percent(number) for number in numbers]
            lines.append(tuple(cells))
    thresholds = []
    for below in THRESHOLDS:
        cells = [str(below)]
        for one in measured.values():
            unsure, changed, kept = one.again(KEEP, below)
            cells += [_percent(number) for number in (unsure.mean(), kept.mean(), changed.mean())]
        thresholds.append(tuple(cells))
    aucs = [
        f"{name} " + ", ".join(f"{auc(one.sure(keep), one.changed(label_of(keep))):.2f} at {keep}" for keep in KEEPS)
        for name, one in measured.items()
    ]
    heldout = measured["held out"]
    changed, sure = heldout.changed(label_of(KEEP)), heldout.sure(KEEP)
    here = heldout.kinds == "read"
    same = []
    for name, one in measured.items():
        pair = [(one.kept(label).mean(), one.changed(label).mean()) for label in _pair(EQUAL[name])]
        (kept, changed_again), (fixed_kept, fixed) = ([_percent(number) for number in cells] for cells in pair)
        same.append(
            f"{changed_again} % {name} (kept {kept}) where keep={EQUAL[name]} changes {fixed} (kept {fixed_kept})"
        )
    return _PART.format(
        count=heldout.count,
        unseen=measured["unlike its training"].count,
        heldout=RESULTS["held out"],
        strange=RESULTS["unlike its training"],
        below=BELOW,
        keep=KEEP,
        table=pages.markdown(header, lines),
        thresholds=pages.markdown(("below", *header[1:]), thresholds),
        aucs="; ".join(aucs),
        kind=f"{auc(sure[here], changed[here]):.2f}",
        same=", and ".join(same),
    )


def _pair(fixed: float) -> tuple[str, str]:
    return label_of(KEEP, again=True), label_of(fixed)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
