"""How answers hold on pictures unlike mini's training, as the section of docs/evaluation.md between its marks."""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

from recipes.unseen import GROUPS

from tests.support.docs import pages

RESULT = "evaluation/results/mini-unseen.json"

_PART = """\
Measured: {count} questions about {pictures} pictures, greedy, float32 on a CPU, every answer in
[mini-unseen.json](../{result}).
Answers that are not the untrimmed model's, in per cent: of all pictures, and of each group. *Right* says how well the
model does at all; untrimmed, {untrimmed} % are right.

{table}

Lossless changed {lossless} of {count} answers. What is safe on pictures like those in training is not safe on strange
ones: contribution at keep=0.1 changes {here} % here, and {there} % of the held-out answers. The order of the
rules stays the same. So calibrate a budget on pictures like those that it will meet.
"""


def committed() -> dict[str, Any]:
    """The result that is kept in the repository."""
    found: dict[str, Any] = json.loads(pages.text(RESULT))
    return found


def rows() -> dict[str, dict[str, float]]:
    """By setting, random's draws together: per cent changed, of all and of each group, and per cent right."""
    found = committed()
    ids = [item["id"] for item in found["items"]]
    untrimmed = found["predictions"]["untrimmed"]["answer"]
    made: dict[str, list[dict[str, float]]] = {}
    for label, prediction in found["predictions"].items():
        name, _, rest = label.partition(" ")
        changed = [one != other for one, other in zip(prediction["answer"], untrimmed, strict=True)]
        row = {"overall": 100 * mean(changed), "right": 100 * mean(prediction["right"])}
        for group in GROUPS:
            row[group] = 100 * mean(c for c, one in zip(changed, ids, strict=True) if one.startswith(f"{group}-"))
        made.setdefault(" ".join(filter(None, (name.partition(":")[0], rest))), []).append(row)
    return {name: {field: mean(one[field] for one in draws) for field in draws[0]} for name, draws in made.items()}


def part() -> str:
    """The section, from the committed result."""
    found, measured = committed(), rows()
    count = found["dataset"]["questions"]
    header, lines = ("", "all pictures", *(f"*{group}*" for group in GROUPS), "right"), []
    for name, row in measured.items():
        if name != "untrimmed":
            lines.append((name, *(f"{row[field]:.1f}" for field in ("overall", *GROUPS, "right"))))
    heldout = json.loads(pages.text("evaluation/results/mini-policies.json"))["predictions"]
    pair = heldout["untrimmed"]["answer"], heldout["contribution keep=0.1"]["answer"]
    return _PART.format(
        count=count,
        pictures=count // len({item["kind"] for item in found["items"]}),
        result=RESULT,
        untrimmed=f"{measured['untrimmed']['right']:.1f}",
        table=pages.markdown(header, lines),
        lossless=f"{measured['lossless']['overall'] * count / 100:.0f}",
        here=f"{measured['contribution keep=0.1']['overall']:.1f}",
        there=f"{100 * mean(one != other for one, other in zip(*pair, strict=True)):.1f}",
    )
