"""What holds in more than one training run of mini, as two sections of docs/evaluation.md between their marks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from statistics import mean, stdev
from typing import Any

import numpy as np

from crosstrim.eval import metrics
from tests.support.docs import pages, policies

MODELS = ("mini", "mini-20250405", "mini-20250406")
BUDGETS = (0.2, 0.1, 0.05)
RULES = ("contribution", "union", "random")
KS = (0.25, 0.1, 0.05)

_RUNS = """\
Measured: per cent of the same {count} held-out questions answered exactly right by the embedded mini and two siblings
of other weights and other lessons, greedy, float32 on a CPU, every answer in
{files}.
*Spread* is the standard deviation over the three. *Random* is the mean of three draws.

{table}

Points that *contribution* is ahead of the paper's *union* at the same budget, question by question, with the 95 %
bootstrap band of each model:

{gains}

**What holds in all three.** Lossless trimming changes {changed} of the {asked} answers. *Contribution* is ahead of
*union* at {holds}, outside every band, and *random* is far behind both.

**What does not.** How much a budget costs. *Contribution* at keep=0.2 loses {fifth} points,
and at keep=0.1 {tenth}. The embedded mini, the first of each, is the most forgiving of the three; so learn
what a budget costs from [your own questions](calibration.md).
"""
_AXIS = """\
Measured: the paper's rule at one `k` after another, by mini and its siblings, on the same questions
({files}).
*Kept* is the share of the visible features that the union of the heads keeps, *right* that of right answers, both in
per cent.

{table}

The paper reports that questions with open answers keep more. Per cent kept by kind of question, where *lookups* ask
about one digit and the others about the whole picture:

{kinds}

So what a `k` keeps is nearly the same in all three: {quarter} % at k=0.25 and {twentieth} % at k=0.05. It does not
follow the kind of question on this task: which kind keeps most changes from model to model and from `k` to `k`, and
from k=0.1 down all kinds of a model lie within {differ} points.
"""


@cache
def committed(model: str, what: str) -> dict[str, Any]:
    """A result that is kept in the repository; nobody writes to it."""
    found: dict[str, Any] = json.loads(pages.text(path(model, what)))
    return found


def path(model: str, what: str) -> str:
    """Where the answers of a model are: of `what` policies at budgets, or of the paper's k."""
    return f"evaluation/results/{model}-{what}.json"


def right(model: str, label: str) -> np.ndarray:
    """[questions]: whether each answer is right; for random the share of its draws."""
    run, (policy, _, rest) = committed(model, "policies"), label.partition(" ")
    draws = [one for one in run["predictions"] if one == label or re.fullmatch(rf"{policy}:\d+ {rest}", one)]
    return policies.right(run, draws)


def accuracy(model: str, setting: str) -> float:
    """Per cent right; a setting is "untrimmed", "k=0.25", or a budget and its rule: "keep=0.1 union"."""
    if setting.startswith("k="):
        return 100 * float(_summary(model)[float(setting[2:])]["overall"]["accuracy"]["mean"])
    return 100 * float(right(model, " ".join(reversed(setting.split()))).mean())


def ahead(model: str) -> dict[float, metrics.Estimate]:
    """By budget, how many points contribution is ahead of union."""
    pairs = [right(model, f"contribution keep={keep}") - right(model, f"union keep={keep}") for keep in BUDGETS]
    return dict(zip(BUDGETS, metrics.bootstrap(100 * np.stack(pairs, 1)), strict=True))


def lost(model: str, keep: float) -> float:
    """How many points contribution loses against the untrimmed model."""
    return 100 * float((right(model, "untrimmed") - right(model, f"contribution keep={keep}")).mean())


def changed(model: str) -> int:
    """How many answers lossless trimming changed."""
    predictions = committed(model, "policies")["predictions"]
    pairs = zip(predictions["lossless"]["answer"], predictions["untrimmed"]["answer"], strict=True)
    return sum(one != other for one, other in pairs)


def runs() -> str:
    """The section about three runs, from the committed results."""
    labels = ["untrimmed", *(f"{rule} keep={keep}" for keep in BUDGETS for rule in RULES)]
    lines = []
    for label in labels:
        shares = [100 * float(right(model, label).mean()) for model in MODELS]
        lines.append((label, *(f"{one:.1f}" for one in (*shares, mean(shares), stdev(shares)))))
    gains = {model: ahead(model) for model in MODELS}
    rows = [
        (f"keep={keep}", *("{:+.1f} [{:+.1f}, {:+.1f}]".format(*_band(gains[model][keep])) for model in MODELS))
        for keep in BUDGETS
    ]
    count = committed("mini", "policies")["dataset"]["questions"]
    return _RUNS.format(
        count=count,
        files=_links("policies"),
        table=pages.markdown(("", *MODELS, "mean", "spread"), lines),
        gains=pages.markdown(("", *MODELS), rows),
        changed=sum(map(changed, MODELS)),
        asked=len(MODELS) * count,
        holds=_listed(BUDGETS),
        fifth=_listed([f"{lost(model, 0.2):.1f}" for model in MODELS]),
        tenth=_listed([f"{lost(model, 0.1):.1f}" for model in MODELS]),
    )


def _band(one: metrics.Estimate) -> tuple[float, float, float]:
    return one.mean, one.low, one.high


def axis() -> str:
    """The section about the paper's k, from the committed results."""
    found = {model: _summary(model) for model in MODELS}
    header = ("", *(f"{model}, {what}" for model in MODELS for what in ("kept", "right")))
    lines = []
    for k in found["mini"]:
        cells = [found[model][k]["overall"] for model in MODELS]
        shares = [100 * share for cell in cells for share in (cell["kept_fraction"], cell["accuracy"]["mean"])]
        lines.append((f"k={k}", *(f"{share:.1f}" for share in shares)))
    kinds = [
        (f"{model}, k={k}", *(f"{share:.1f}" for share in kept_by_kind(model, k).values()))
        for model in MODELS
        for k in KS
    ]
    every = [list(kept_by_kind(model, k).values()) for model in MODELS for k in found[model] if k <= 0.1]
    return _AXIS.format(
        files=_links("k"),
        table=pages.markdown(header, lines),
        kinds=pages.markdown(("", *kept_by_kind("mini", KS[0])), kinds),
        quarter=pages.span(found[model][0.25]["overall"]["kept_fraction"] for model in MODELS),
        twentieth=pages.span(found[model][0.05]["overall"]["kept_fraction"] for model in MODELS),
        differ=f"{max(max(row) - min(row) for row in every):.1f}",
    )


def kept_by_kind(model: str, k: float) -> dict[str, float]:
    """Per cent of the features that lookups, counting and reading keep."""
    kept = {kind: 100 * cell["kept_fraction"] for kind, cell in _summary(model)[k]["kinds"].items()}
    lookups = mean(share for kind, share in kept.items() if kind not in policies.WHOLE_OF_IT)
    return {"lookups": lookups, **{kind: kept[kind] for kind in policies.WHOLE_OF_IT}}


def _summary(model: str) -> dict[float, dict[str, Any]]:
    found = committed(model, "k")
    by_group = {one["group"]: one["config"]["k"] for one in found["settings"] if one["config"] and one["config"]["k"]}
    return {by_group[row["group"]]: row for row in found["summary"] if row["group"] in by_group}


def _links(what: str) -> str:
    *most, last = (f"[{model}-{what}.json](../{path(model, what)})" for model in MODELS)
    return "\n".join([f"{one}," for one in most[:-1]] + [f"{most[-1]} and", last])


def _listed(items: Sequence[object]) -> str:
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}"
