"""One trim beside the untrimmed model on the embedded benchmark: a sweep of one setting, told in a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from crosstrim import mini
from crosstrim.asking import answering
from crosstrim.config import TrimConfig
from crosstrim.data import dataset
from crosstrim.eval import provenance, summary, sweep
from crosstrim.eval.defaults import HELDOUT_TOKENS
from crosstrim.eval.settings import UNTRIMMED, Setting
from crosstrim.method.policy import name_of
from crosstrim.models import quantised

MAX_NEW_TOKENS = HELDOUT_TOKENS
"""Longer than any right answer."""

Progress = Callable[[int, int], None]


def evaluate(
    model: Any,
    processor: Any,
    config: TrimConfig,
    *,
    quick: bool = False,
    batch_size: int = 64,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Ask every question of the untrimmed and of the trimmed model.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        config: how to trim.
        quick: whether to ask only the first few questions of each kind and layout.
        batch_size: questions answered together.
        progress: called with how many questions are done, and of how many.

    Returns:
        The result as plain JSON types, with everything it depends on.
    """
    asked = dataset.embedded(quick)
    trimmed = Setting(name_of(config.decider), answering.for_tokenizer(config, processor.tokenizer))
    answerer = sweep.Answerer(model, processor, [trimmed], MAX_NEW_TOKENS)
    records, total = [], len(asked.items)
    progress(0, total)
    for record in answerer.records(asked, batch_size):
        records.append(record)
        progress(record["first"] + len(record["visible"]), total)
    found, kinds = sweep.collected(asked, records), [item.kind for item in asked.items]

    def numbers(label: str) -> dict[str, Any]:
        prediction = found["predictions"][label]
        kept = summary.held_fraction(prediction, found["visible"])
        means = {"accuracy": _means(prediction["right"], kinds), "kept_fraction": _means(kept.tolist(), kinds)}
        return {**means, "seconds": found["seconds"][label]}

    return {
        "benchmark": asked.name,
        "quick": quick,
        "questions": total,
        "questions_per_kind": asked.kinds,
        "layouts": sorted({row["layout"] for row in mini.select(mini.heldout(), quick)}),
        "untrimmed": numbers(UNTRIMMED),
        "trimmed": numbers(trimmed.label),
        "config": trimmed.config.to_dict(),
        "generation": {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "batch_size": batch_size},
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantised.name_of(model.config),
        **provenance.of_software(model),
    }


def _means(values: Sequence[float], kinds: Sequence[str]) -> dict[str, Any]:
    """Over all questions and over those of each kind."""
    of_kind: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind, value in zip(kinds, values, strict=True):
        of_kind[kind].append(value)
    return {"overall": round(fmean(values), 4), "kinds": {kind: round(fmean(of), 4) for kind, of in of_kind.items()}}
