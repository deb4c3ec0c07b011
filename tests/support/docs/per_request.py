"""Whether a prompt tells that its answer will change, as the section of docs/calibration.md between its marks."""

from __future__ import annotations

import json
from typing import Any

from tests.support.docs import pages

RESULT = "evaluation/results/mini-per-request.json"

_PART = """\
Measured on mini's {count} held-out questions, under `{policy}` ([mini-per-request.json](../{result})).
*AUC* is the chance that a question whose answer changes has a smaller number than one whose answer stays: 0.5 says
nothing, 1 and 0 say everything. *Spent* gives keep={small} to the surest questions and keep={large} to the others, so
that the mean is {middle}, and counts the answers that change, in per cent. The surest are those with the largest
numbers or those with the smallest, whichever turned out better.

{table}

The same keep={middle} for every question changes {fixed} %. Drawing lots between the two budgets would change
{lots} %.
"""


def committed() -> dict[str, Any]:
    """The result that is kept in the repository."""
    found: dict[str, Any] = json.loads(pages.text(RESULT))
    return found


def lots(found: dict[str, Any]) -> float:
    """The share that changes where lots decide who gets which budget."""
    small, middle, large = found["config"]["keeps"]
    share = (large - middle) / (large - small)
    return share * found["changed"][str(small)] + (1 - share) * found["changed"][str(large)]


def part() -> str:
    """The section, from the committed result."""
    found = committed()
    keeps = found["config"]["keeps"]
    small, middle, large = keeps
    header, lines = ("number", *(f"AUC at {keep}" for keep in keeps), "spent"), []
    for row in found["rows"]:
        aucs = [f"{row['auc'][str(keep)]:.2f}" for keep in keeps]
        spent = f"{100 * row['mixed']:.1f} ± {100 * row['mixed_error']:.1f}"
        lines.append((f"*{row['number']}*", *aucs, spent))
    return _PART.format(
        count=found["source"]["dataset"]["questions"],
        policy=found["config"]["policy"],
        result=RESULT,
        small=small,
        middle=middle,
        large=large,
        table=pages.markdown(header, lines),
        fixed=f"{100 * found['changed'][str(middle)]:.1f}",
        lots=f"{100 * lots(found):.1f}",
    )
