"""Whether a prompt tells that its trimmed answer will change: `python -m recipes.per_request`.

If it did, each request could have a budget of its own: small where that is safe, larger where it is not. Numbers that
are known once the first cross-attention layer has scored are measured on mini's held-out questions, and held against
the answers of evaluation/results/mini-policies.json. Writes evaluation/results/mini-per-request.json.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recipes import calibration

import crosstrim
from crosstrim.asking.batches import Encoder
from crosstrim.data import dataset
from crosstrim.eval import provenance
from crosstrim.files import write_json
from crosstrim.method import policies
from crosstrim.method.policy import Evidence

OUT = calibration.RESULTS / "mini-per-request.json"

POLICY = "contribution"
KEEPS = (0.05, 0.1, 0.2)
SMALL, MIDDLE, LARGE = KEEPS
NUMBERS = ("held", "margin", "entropy", "agreement")


def numbers(evidence: Evidence, keep: float) -> dict[str, float]:
    """What a prompt says of itself; the larger each is, the surer it ought to be.

    Args:
        evidence: of one sample with one image.
        keep: the budget.

    Returns:
        `held`: the share of the heads' attention that what is kept draws. `margin`: how far the saliency of the last
        one kept, in order of saliency, is above that of the next, relative to the mean. `entropy`: of the heads' mean
        attention over the m visible features, of log m, negated. `agreement`: the mean share of the top tenths that
        two heads have in common.
    """
    seen = evidence.visible[0]
    saliency = evidence.saliency[0][:, seen].double()
    votes = policies.voter(POLICY)(evidence)
    kept = crosstrim.select(votes, evidence.visible, keep=keep)[0][seen]
    mean = saliency.mean(0) / saliency.mean(0).sum()
    ordered = mean.sort(descending=True).values
    cut = int(kept.sum())
    tops = torch.zeros_like(saliency).scatter(1, saliency.topk(max(1, saliency.shape[1] // 10)).indices, 1.0)
    common = tops @ tops.T / tops.sum(1)
    apart = ~torch.eye(len(common), dtype=torch.bool)
    return {
        "held": float(mean[kept].sum()),
        "margin": float((ordered[cut - 1] - ordered[min(cut, len(ordered) - 1)]) * len(ordered)),
        "entropy": float((mean * mean.clamp_min(1e-12).log()).sum() / np.log(len(mean))),
        "agreement": float(common[apart].mean()),
    }


def measured() -> list[dict[str, dict[str, float]]]:
    """For each held-out question, by budget, its numbers."""
    model, processor = crosstrim.load("mini")
    encoder, found = Encoder(model, processor), []
    for item in dataset.embedded().items:
        seen: list[Evidence] = []

        def watch(evidence: Evidence, seen: list[Evidence] = seen) -> torch.Tensor:
            seen.append(evidence)
            return policies.voter(POLICY)(evidence)

        with (
            encoder.asked([[item.open()]], [item.question]) as inputs,
            crosstrim.trim(model, policy=watch, keep=SMALL),
            torch.no_grad(),
        ):
            model(**inputs)
        found.append({str(keep): numbers(seen[0], keep) for keep in KEEPS})
    return found


def auc(sure: NDArray[np.float64], changed: NDArray[np.bool_]) -> float | None:
    """The chance that a question whose answer changes is less sure than one whose answer stays; ties count half."""
    if changed.all() or not changed.any():
        return None
    values, places = np.unique(sure, return_inverse=True)
    counts = np.bincount(places, minlength=len(values))
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    bad = int(changed.sum())
    below = ranks[~changed].sum() - (len(sure) - bad) * (len(sure) - bad + 1) / 2
    return float(below / (bad * (len(sure) - bad)))


def mixed(sure: NDArray[np.float64], small: NDArray[np.bool_], large: NDArray[np.bool_]) -> tuple[float, float]:
    """Changed answers, and their standard error, where the surest have the small budget and the mean is `MIDDLE`.

    Surest are those with the largest numbers or those with the smallest, whichever turns out better.
    """
    share = (LARGE - MIDDLE) / (LARGE - SMALL)
    ways = []
    for sign in (-1, 1):
        safe = np.argsort(np.argsort(sign * sure, kind="stable"), kind="stable") < share * len(sure)
        lost = np.where(safe, small, large)
        ways.append((float(lost.mean()), float(lost.std(ddof=1) / len(lost) ** 0.5)))
    return min(ways)


def compute() -> dict[str, Any]:
    """The result as plain JSON types."""
    source = json.loads(calibration.SOURCE.read_text(encoding="utf-8"))
    losses = calibration.changed(source, POLICY)
    changed = {keep: losses[:, calibration.KEEPS.index(keep)] for keep in KEEPS}
    kinds = np.array([item["kind"] for item in source["items"]])
    found = measured()
    table = {
        name: {str(keep): np.array([one[str(keep)][name] for one in found]) for keep in KEEPS} for name in NUMBERS
    }
    rows = []
    for name in NUMBERS:
        aucs = {str(keep): auc(table[name][str(keep)], changed[keep]) for keep in KEEPS}
        per_kind = {
            str(kind): auc(table[name][str(SMALL)][kinds == kind], changed[SMALL][kinds == kind])
            for kind in dict.fromkeys(kinds.tolist())
        }
        lost, error = mixed(table[name][str(SMALL)], changed[SMALL], changed[LARGE])
        rows.append({"number": name, "auc": aucs, "auc_of_kinds": per_kind, "mixed": lost, "mixed_error": error})
    return {
        "format": 1,
        "source": {"name": calibration.SOURCE.name, "dataset": source["dataset"], "model": source["model"]},
        "config": {"policy": POLICY, "keeps": KEEPS},
        "changed": {str(keep): float(one.mean()) for keep, one in changed.items()},
        "rows": rows,
        "items": {name: table[name][str(SMALL)].round(6).tolist() for name in NUMBERS},
        "answers_made_with": {"versions": source["versions"], "compat": source["compat"]},
        **provenance.of_software(crosstrim.load("mini")[0]),
    }


if __name__ == "__main__":
    write_json(OUT, compute())
