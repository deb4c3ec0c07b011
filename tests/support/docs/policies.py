"""The measured comparison of policies, as the section of docs/evaluation.md between its marks."""

from __future__ import annotations

import json
from functools import cache
from statistics import mean
from typing import Any

import numpy as np

from crosstrim.eval import metrics
from tests.support.docs import pages

RESULTS = ("evaluation/results/mini-policies.json", "evaluation/results/mini-rivals.json")
WHOLE_OF_IT = ("count", "read")
"""Kinds of question that need the whole picture; the others look one digit up."""

_PART = """\
Measured: all {count} held-out questions, greedy, float32 on a CPU, every answer in
[mini-policies.json](../{policies}) and [mini-rivals.json](../{rivals}). Points gained or lost against the
untrimmed model, which answers {untrimmed} % right. *Against union* is the difference to the paper's rule at the
same budget, question by question, with its 95 % bootstrap band; the first layer's own cache is trimmed.

{table}

With the first cross-attention layer's cache left whole instead:

{whole}

**What follows.** At keep=0.5 the paper's `union` loses {union_half} points: trimming half is as good as free,
by any rule that looks at the attention. The smaller the budget, the more the rule matters. At keep=0.2
`contribution` loses {lookups} on lookups, {count_lost} on count and {read} on read; at keep=0.1 it is {tenth}
points ahead of `union` and at keep=0.05 {twentieth}, far outside the bands. `union` concentrates: its heads
agree on a few places, and questions about the whole picture suffer. Diversity mends that, more so when measured
on what features add (`contribution`) than on what attracts attention (`mmr`). So `contribution` decides where
`keep` is given and no policy is named. It was chosen on 512 validation questions, with other handwriting and
other photographs than these; that diversity helps had shown before on 128 of these. Blind rules lose far more:
which features stay does matter, except for count, which a coarse view of everything can answer.

All of this is one small model with {features} features per image, on one task. It has not been measured on
Llama-3.2-Vision; the commands to do so are below.
"""


def written() -> str:
    """The section, from the committed results."""
    runs = committed()
    untrimmed = runs[0]["summary"][0]["overall"]["accuracy"]["mean"]
    found = {(row["policy"], row["keep"]): row for row in rows(trim_first_layer=True)}
    fifth = found["contribution", 0.2]
    return _PART.format(
        count=runs[0]["dataset"]["questions"],
        policies=RESULTS[0],
        rivals=RESULTS[1],
        untrimmed=f"{100 * untrimmed:.1f}",
        table=_table(trim_first_layer=True),
        whole=_table(trim_first_layer=False),
        union_half=f"{-found['union', 0.5]['all']:.1f}",
        lookups=f"{abs(fifth['lookups']):.1f}",
        count_lost=f"{abs(fifth['count']):.1f}",
        read=f"{abs(fifth['read']):.1f}",
        tenth=f"{found['contribution', 0.1]['against'][0]:.1f}",
        twentieth=f"{found['contribution', 0.05]['against'][0]:.1f}",
        features=runs[0]["model"]["features_per_image"],
    )


@cache
def committed() -> list[dict[str, Any]]:
    """The results that are kept in the repository; nobody writes to them."""
    return [json.loads(pages.text(name)) for name in RESULTS]


@cache
def rows(trim_first_layer: bool) -> list[dict[str, Any]]:
    """One row per setting with a budget, the smallest budget first; numbers in points."""
    runs = committed()
    union = {
        setting["config"]["keep"]: right(runs[0], [setting["label"]])
        for setting in runs[0]["settings"]
        if setting["config"]["policy"] == "union" and setting["config"]["trim_first_layer"] == trim_first_layer
    }
    found = []
    for run in runs:
        groups: dict[str, list[dict[str, Any]]] = {}
        for setting in run["settings"]:
            if setting["config"]["trim_first_layer"] == trim_first_layer:
                groups.setdefault(setting["group"], []).append(setting)
        for row in run["summary"]:
            if row["group"] in groups and groups[row["group"]][0]["label"] != "lossless":
                found.append(_row(run, row, groups[row["group"]], union))
    gains = [row for row in found if row["against"] is not None]
    # All in one call, which draws its resamples once.
    for row, band in zip(gains, metrics.bootstrap(np.stack([row["against"] for row in gains], 1)), strict=True):
        row["against"] = tuple(100 * one for one in (band.mean, band.low, band.high))
    return sorted(found, key=lambda row: (row["keep"] is None, row["keep"] or row["kept"], -row["all"]))


def _row(
    run: dict[str, Any], row: dict[str, Any], settings: list[dict[str, Any]], union: dict[float, np.ndarray]
) -> dict[str, Any]:
    """One row; its `against` is still what each question gains."""
    config, change = settings[0]["config"], {name: cell["accuracy_change"] for name, cell in row["kinds"].items()}
    keep = config["keep"]
    against = None
    if keep in union and config["policy"] != "union":
        against = right(run, [setting["label"] for setting in settings]) - union[keep]
    return {
        "policy": config["policy"].partition(":")[0] if len(settings) > 1 else config["policy"],
        "keep": keep,
        "seeds": len(settings),
        "kept": 100 * row["overall"]["kept_fraction"],
        "all": 100 * row["overall"]["accuracy_change"]["mean"],
        "band": tuple(100 * row["overall"]["accuracy_change"][name] for name in ("low", "high")),
        "lookups": 100 * mean(one["mean"] for name, one in change.items() if name not in WHOLE_OF_IT),
        **{name: 100 * change[name]["mean"] for name in WHOLE_OF_IT},
        "against": against,
    }


def right(run: dict[str, Any], labels: list[str]) -> np.ndarray:
    """[questions]: the share of the draws that answered right."""
    return np.mean([np.array(run["predictions"][label]["right"], dtype=float) for label in labels], axis=0)


def _table(trim_first_layer: bool) -> str:
    header = ["policy", "keep", "kept %", "all questions", "lookups", "count", "read", "against union"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows(trim_first_layer):
        low, high = row["band"]
        against = row["against"]
        lines.append(
            [
                row["policy"] + (f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""),
                "" if row["keep"] is None else str(row["keep"]),
                f"{row['kept']:.1f}",
                f"{row['all']:+.1f} [{low:+.1f}, {high:+.1f}]",
                *(f"{row[name]:+.1f}" for name in ("lookups", *WHOLE_OF_IT)),
                "" if against is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*against),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
