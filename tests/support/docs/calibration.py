"""Whether calibration keeps its promise, as the section of docs/calibration.md between its marks."""

from __future__ import annotations

import json
from typing import Any

from tests.support.docs import pages

RESULT = "evaluation/results/mini-calibration.json"

_PART = """\
Measured on mini's {count} held-out questions, from the answers in
[mini-policies.json](../evaluation/results/mini-policies.json), so that no model runs
([mini-calibration.json](../{result})).
{splits} times, some of the questions are drawn and calibrated on, with confidence {confidence} %; the others
show whether the risk of anything certified is above what was allowed. The budgets are {keeps},
in this order.

{table}

*Broken*: splits in which a certified budget changed more of the other answers than allowed. *Refused*: no budget was
certified. *Mean keep* is that of the chosen budgets, refusals left out. The risks themselves, over all of the
questions, in per cent:

{risks}

**What follows.** The bound was broken in at most {most} % of the splits, where {allowed} % is what it allows. The
price is caution: at a risk of {strict} % the mean keep with contribution is {cautious} from {few} questions
and {bold} from {many}, although {true} would have been safe: its risk is {true_risk} %. More questions make
bolder budgets.
"""


def part() -> str:
    """The section, from the committed result."""
    found = json.loads(pages.text(RESULT))
    config, policies = found["config"], found["policies"]
    rows = {(policy, row["questions"], row["risk"]): row for policy, one in policies.items() for row in one["rows"]}
    broken = max(row["broken"]["others"] for row in rows.values())
    risks = policies["contribution"]["risks"]
    safe = min(keep for keep in config["keeps"] if risks[str(keep)] <= 0.02)
    return _PART.format(
        count=found["source"]["dataset"]["questions"],
        result=RESULT,
        splits=f"{config['splits']:,}",
        confidence=f"{100 * config['confidence']:.0f}",
        keeps=", ".join(map(str, config["keeps"])),
        table=_table(rows, config["splits"]),
        risks=_risks(policies, config["keeps"]),
        most=f"{100 * broken / config['splits']:.1f}",
        allowed=f"{100 * (1 - config['confidence']):.0f}",
        few=300,
        many=600,
        strict=2,
        cautious=f"{rows['contribution', 300, 0.02]['mean_keep']:.2f}",
        bold=f"{rows['contribution', 600, 0.02]['mean_keep']:.2f}",
        true=f"keep={safe}",
        true_risk=f"{100 * risks[str(safe)]:.1f}",
    )


def _table(rows: dict[tuple[str, int, float], dict[str, Any]], splits: int) -> str:
    lines = ["| policy | questions | risk % | mean keep | refused % | broken % |", "| --- |" + " ---: |" * 5]
    for (policy, count, risk), row in rows.items():
        impossible = count < row["needed"]
        refused = f"{100 * row['refused'] / splits:.1f}" + (f" (needs {row['needed']})" if impossible else "")
        keep = "" if row["mean_keep"] is None else f"{row['mean_keep']:.3f}"
        broken = f"{100 * row['broken']['others'] / splits:.1f}"
        lines.append(f"| {policy} | {count} | {100 * risk:.0f} | {keep} | {refused} | {broken} |")
    return "\n".join(lines)


def _risks(policies: dict[str, Any], keeps: list[float]) -> str:
    lines = ["| keep | " + " | ".join(policies) + " |", "| --- |" + " ---: |" * len(policies)]
    for keep in keeps:
        cells = [f"{100 * one['risks'][str(keep)]:.2f}" for one in policies.values()]
        lines.append(f"| {keep} | {' | '.join(cells)} |")
    return "\n".join(lines)
