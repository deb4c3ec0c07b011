"""Whether a calibration keeps its promise, on random splits of mini's questions: `python -m recipes.calibration`.

Reads every answer of evaluation/results/mini-policies.json, so that no model runs. Each split calibrates on some of
the questions and looks at the others, of which it saw nothing. Writes evaluation/results/mini-calibration.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosstrim.eval import provenance, risk
from crosstrim.files import write_json

RESULTS = Path(__file__).parents[1] / "evaluation" / "results"
SOURCE = RESULTS / "mini-policies.json"
OUT = RESULTS / "mini-calibration.json"

CONFIDENCE = 0.95
SPLITS = 1000
SEED = 0
COUNTS = (150, 300, 600)
RISKS = (0.01, 0.02, 0.05)
POLICIES = ("union", "contribution")
KEEPS = (0.5, 0.35, 0.2, 0.1, 0.05)
"""In the order of the tests."""


def changed(source: dict[str, Any], policy: str) -> NDArray[np.bool_]:
    """[questions, budgets]: whether an answer differs from the untrimmed model's."""
    predictions = source["predictions"]
    untrimmed = np.array(predictions["untrimmed"]["answer"])
    answers = [np.array(predictions[f"{policy} keep={keep}"]["answer"]) for keep in KEEPS]
    return np.stack([answer != untrimmed for answer in answers], axis=1)


def split(losses: NDArray[np.bool_], count: int, level: float) -> dict[str, Any]:
    """What comes of calibrating on `count` of the questions, over all splits.

    Args:
        losses: of `changed`.
        count: questions to calibrate on.
        level: the risk that is allowed.

    Returns:
        How often each budget was chosen, how often none was, and how often the chosen one's risk was above the level:
        on the questions that the split left, and on all of them.
    """
    generator = np.random.default_rng(SEED)
    everywhere = losses.mean(0)
    chosen = [0] * len(KEEPS)
    broken = {"others": 0, "all": 0}
    for _ in range(SPLITS):
        order = generator.permutation(len(losses))
        taken, others = losses[order[:count]], losses[order[count:]]
        passed = risk.certified(taken.sum(0).tolist(), count, level, CONFIDENCE)
        if passed:
            chosen[passed - 1] += 1
            # Whatever was certified is part of the promise, not only the smallest of it.
            broken["others"] += bool((others.mean(0)[:passed] > level).any())
            broken["all"] += bool((everywhere[:passed] > level).any())
    spent = [keep for keep, times in zip(KEEPS, chosen, strict=True) for _ in range(times)]
    return {
        "questions": count,
        "risk": level,
        "chosen": {str(keep): times for keep, times in zip(KEEPS, chosen, strict=True)},
        "refused": SPLITS - len(spent),
        "broken": broken,
        "mean_keep": round(float(np.mean(spent)), 6) if spent else None,
        "needed": risk.needed(level, CONFIDENCE),
    }


def compute() -> dict[str, Any]:
    """The result as plain JSON types."""
    source = json.loads(SOURCE.read_text(encoding="utf-8"))
    return {
        "format": 1,
        "source": {"name": SOURCE.name, "dataset": source["dataset"], "model": source["model"]},
        "config": {"splits": SPLITS, "seed": SEED, "confidence": CONFIDENCE, "keeps": KEEPS, "loss": "answer"},
        "policies": {
            policy: {
                "risks": dict(zip(map(str, KEEPS), changed(source, policy).mean(0).round(6).tolist(), strict=True)),
                "rows": [split(changed(source, policy), count, level) for count in COUNTS for level in RISKS],
            }
            for policy in POLICIES
        },
        "answers_made_with": {"versions": source["versions"], "compat": source["compat"]},
        "versions": {**provenance.of_software()["versions"], "numpy": np.__version__},
    }


if __name__ == "__main__":
    write_json(OUT, compute())
