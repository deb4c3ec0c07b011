"""What quantised weights do to what is kept, as the section of docs/evaluation.md between its marks."""

from __future__ import annotations

import json
from typing import Any

from tests.support.docs import pages

RESULT = "evaluation/results/mini-quantised.json"

_PART = """\
Measured on {count} of mini's held-out questions, greedy, in float32 on a CPU ([mini-quantised.json](../{result}),
by `python -m recipes.quantised`), in per cent. *Kept alike* is the share of what the whole model keeps that the
quantised one keeps too. *By quantising* are untrimmed answers that differ from the whole model's; *by trimming* are
trimmed answers that differ from the same model's untrimmed ones. *The leader* is q, k and v of the first cross-
attention layer, which score features.

{table}

- **What is kept** depends on both the leader and the vision tower. In nf4 all but both gives {usual} % at keep=0.1;
  with the leader quantised as well it is {no_vision} %, with the tower quantised as well {no_leader} %.
- **No effect on the answers was seen.** One question is {one} %, and no row differs from the first by more than
  {spread} questions in any column. So few questions would not show an effect of one per cent.
- So `quantization=` leaves both whole. On 11B in nf4 that costs 1.2 GB of 8.4.

How Llama-3.2-Vision does was not measured.
"""


def committed() -> dict[str, Any]:
    """The result that is kept in the repository."""
    found: dict[str, Any] = json.loads(pages.text(RESULT))
    return found


def overlap(name: str, way: str, keep: str = "keep=0.1") -> float:
    """Per cent of what the whole model keeps that one quantised so keeps too."""
    (row,) = (row for row in committed()["rows"] if (row["quantization"], row["quantised"]) == (name, way))
    return float(100 * row["budgets"][keep]["overlap"])


def part() -> str:
    """The section, from the committed result."""
    found = committed()
    whole, *others = found["rows"]
    count, lines = found["dataset"]["questions"], []
    labels = list(whole["budgets"])
    header = ["weights", "quantised", *(f"kept alike, {label}" for label in labels), "changed by quantising"]
    header += [*(f"by trimming, {label}" for label in labels), "right, untrimmed"]
    for row in found["rows"]:
        budgets = row["budgets"].values()
        shares = [*(one["overlap"] for one in budgets), row["changed_by_quantising"]]
        shares += [*(one["changed_by_trimming"] for one in budgets), row["right"]]
        name, way = row["quantization"] or "float32", row["quantised"] or "nothing"
        lines.append((name, way, *(f"{100 * share:.1f}" for share in shares)))
    return _PART.format(
        count=count,
        result=RESULT,
        table=pages.markdown(header, lines),
        usual=f"{overlap('nf4', 'all but both'):.0f}",
        no_vision=f"{overlap('nf4', 'all but the vision tower'):.0f}",
        no_leader=f"{overlap('nf4', 'all but the leader'):.0f}",
        one=f"{100 / count:.2f}",
        spread=max(_questions_apart(row, whole, count) for row in others),
    )


def _questions_apart(row: dict[str, Any], whole: dict[str, Any], count: int) -> int:
    """By how many questions a row differs from the whole model's in its answers, at most."""
    pairs = [(row["right"], whole["right"]), (row["changed_by_quantising"], 0)]
    pairs += [
        (row["budgets"][label][name], whole["budgets"][label][name])
        for label in whole["budgets"]
        for name in ("changed_by_trimming", "right")
    ]
    return max(round(abs(one - other) * count) for one, other in pairs)
