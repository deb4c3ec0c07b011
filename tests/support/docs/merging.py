"""The measured gain of merging, as the section of docs/evaluation.md between its marks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.support.docs import pages

RESULT = "evaluation/results/mini-merge.json"

_PART = """\
Measured: all {count} held-out questions, greedy, float32 on a CPU, every answer in
[mini-merge.json](../{result}).
Right answers in per cent, without `merge` and with it; the untrimmed model has {untrimmed}. *Gain* is their
difference in points, question by question, with its 95 % band (1.96 standard errors of the mean of those
differences). *Changed* answers are not the untrimmed model's, in per cent.

{table}

The less is kept, the more merging gains. It gains more with `union`, whose heads agree on a few places, than with
`contribution`, which spreads out by itself; with that, the gain at keep=0.2 is within chance. Budget and caches are
the same.
"""


def committed() -> dict[str, Any]:
    """The result that is kept in the repository."""
    found: dict[str, Any] = json.loads(pages.text(RESULT))
    return found


def gains() -> list[dict[str, Any]]:
    """One row per policy and budget; numbers in per cent and points."""
    found, rows = committed(), []
    labels = {json.dumps(one["config"], sort_keys=True): one["label"] for one in found["settings"]}
    for setting in found["settings"]:
        if setting["config"]["merge"]:
            plain = labels[json.dumps({**setting["config"], "merge": False}, sort_keys=True)]
            pair = [found["predictions"][label] for label in (plain, setting["label"])]
            without, merged = (np.array(one["right"], dtype=float) for one in pair)
            error = (merged - without).std(ddof=1) / len(merged) ** 0.5
            gain = 100 * (merged - without).mean()
            rows.append(
                {
                    "policy": setting["config"]["policy"],
                    "keep": setting["config"]["keep"],
                    "right": (100 * without.mean(), 100 * merged.mean()),
                    "gain": (gain, gain - 196 * error, gain + 196 * error),
                    "changed": tuple(_changed(found, one) for one in pair),
                }
            )
    return rows


def _changed(found: dict[str, Any], prediction: dict[str, Any]) -> float:
    untrimmed = found["predictions"]["untrimmed"]["answer"]
    return 100 * float(np.mean([one != other for one, other in zip(prediction["answer"], untrimmed, strict=True)]))


def part() -> str:
    """The section, from the committed result."""
    found = committed()
    header, lines = ("policy", "keep", "right", "right, merged", "gain", "changed", "changed, merged"), []
    for row in gains():
        right, changed = (
            [f"{one:.{digits}f}" for one in row[name]] for name, digits in (("right", 1), ("changed", 2))
        )
        gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row["gain"])
        lines.append((row["policy"], str(row["keep"]), *right, gain, *changed))
    return _PART.format(
        count=found["dataset"]["questions"],
        result=RESULT,
        untrimmed=f"{100 * found['summary'][0]['overall']['accuracy']['mean']:.1f}",
        table=pages.markdown(header, lines),
    )
