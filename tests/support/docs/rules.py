"""Rules that were tried beside the shipped ones, as sections of docs/method.md and docs/analysis.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tests.support.docs import pages

RESULT = "evaluation/results/mini-rules.json"

TRIED = {
    "union": "the paper's rule",
    "class tokens first": "the class token of every tile stays before anything else",
    "largest row": "the largest attention that any row pays, in place of the sum over rows",
    "heads by entropy": "a head weighs as much as its attention is sharper than even",
    "spread over the picture": "as `contribution`, but the redundant ones are those that lie side by side",
    "half union, half grid": "in turn the heads' next best feature and the next of an even grid",
    "summary of the dropped": "the last feature kept stands for the mean of all that are dropped",
}
MERGED = {
    "contribution, merged": "shipped: groups by the leader's keys",
    "merged by values": "groups by its values",
    "merged by features": "groups by the vision tower's features",
    "merged without bias": "a mean draws no more attention than one feature",
    "merged in the first layer too": "the first layer's own keys and values are merged as well",
}
LAYERS = {
    "first layer, read whole": "the first layer chooses; later layers show all features to the prompt and drop then",
    "each layer, read whole": "every layer chooses for itself, and shows all features to its prompt",
    "each layer": "every layer chooses for itself, and its prompt reads what it keeps",
    "each layer, of twice the first": "every later layer chooses among twice as many of the first layer's choice",
    "contribution, merged": "beside them: the first layer chooses, and what is dropped is merged",
}

_TRIED = """\
Measured on {count} of mini's validation questions, on which no published number rests, beside `contribution` with the
same cache ([mini-rules.json](../{result}), by `python -m recipes.rules`). *Right* answers are in per cent; *gain* is
the difference from `contribution` in points, question by question, with its standard error. `contribution` itself has
{base}.

{table}
"""

_MERGED = """\
{table}

Untrimmed, {untrimmed} % are right.
"""

_LAYERS = """\
Measured as [the rules that were tried](method.md#rules-that-were-tried), beside `contribution`, whose first layer
chooses for all.

{table}
"""


def committed() -> dict[str, Any]:
    """The result that is kept in the repository."""
    found: dict[str, Any] = json.loads(pages.text(RESULT))
    return found


def row(rule: str, keep: float) -> dict[str, Any]:
    """One measured rule."""
    return next(one for one in committed()["rows"] if (one["rule"], one["keep"]) == (rule, keep))


def _table(rules: dict[str, str], keeps: Sequence[float]) -> str:
    header = ("rule", *(f"{what}, keep={keep}" for keep in keeps for what in ("right", "gain")), "what it does")
    lines = []
    for rule, words in rules.items():
        cells = []
        for keep in keeps:
            one = row(rule, keep)
            cells += [f"{100 * one['right']:.1f}", f"{100 * one['gain']:+.1f} ± {100 * one['gain_error']:.1f}"]
        lines.append((rule, *cells, words))
    return pages.markdown(header, lines)


def tried() -> str:
    """The rules that choose otherwise, and those that merge otherwise."""
    found = committed()
    keeps = found["config"]["keeps"]
    base = " and ".join(f"{100 * row('contribution', keep)['right']:.1f} % at keep={keep}" for keep in keeps)
    first = _TRIED.format(count=found["dataset"]["questions"], result=RESULT, base=base, table=_table(TRIED, keeps))
    return first + "\n" + _MERGED.format(table=_table(MERGED, keeps), untrimmed=f"{100 * found['untrimmed']:.1f}")


def layers() -> str:
    """Later layers that choose for themselves."""
    return _LAYERS.format(table=_table(LAYERS, committed()["config"]["keeps"]))
