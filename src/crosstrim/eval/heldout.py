"""The embedded model's held-out benchmark: accuracy and kept fraction, untrimmed and trimmed, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from crosstrim import mini
from crosstrim.asking import answering
from crosstrim.asking.batches import Encoder
from crosstrim.asking.images import open_image
from crosstrim.config import TrimConfig
from crosstrim.eval.defaults import HELDOUT_TOKENS
from crosstrim.models import compat
from crosstrim.trimming.handle import TrimHandle, trim
from crosstrim.trimming.report import versions

MAX_NEW_TOKENS = HELDOUT_TOKENS
"""Longer than any right answer."""

Question = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass
class Score:
    """Answers of one setting, question by question.

    Attributes:
        right: whether the answer was exactly right.
        kept: kept features as a share of the visible ones.
        seconds: time spent in `generate`, the encoding of pictures not counted.
    """

    right: list[bool] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Means over all questions and per kind, as plain JSON types."""
        kinds = [question["kind"] for question in questions]
        return {
            "accuracy": _means(self.right, kinds),
            "kept_fraction": _means(self.kept, kinds),
            "seconds": round(self.seconds, 2),
        }


def evaluate(
    model: Any,
    processor: Any,
    config: TrimConfig,
    *,
    quick: bool = False,
    batch_size: int = 64,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Ask every question of the untrimmed and of the trimmed model; an answer is right when it is exactly one given.

    Each picture is encoded once for all of its questions and for both settings.

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
    questions = mini.select(mini.heldout(), quick)
    config = answering.for_tokenizer(config, processor.tokenizer)
    encoder, untrimmed, trimmed = Encoder(model, processor), Score(), Score()
    progress(0, len(questions))
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        pictures, asked = [one["image"] for one in batch], [one["question"] for one in batch]
        with encoder.inputs(pictures, asked, open_image, MAX_NEW_TOKENS) as inputs:
            _answer(model, processor, inputs, batch, untrimmed)
            with trim(model, config) as handle:
                _answer(model, processor, inputs, batch, trimmed, handle)
        progress(start + len(batch), len(questions))
    counts = {kind: sum(one["kind"] == kind for one in questions) for kind in _kinds(questions)}
    return {
        "benchmark": "mini-heldout",
        "quick": quick,
        "questions": len(questions),
        "questions_per_kind": counts,
        "layouts": sorted({question["layout"] for question in questions}),
        "untrimmed": untrimmed.to_dict(questions),
        "trimmed": trimmed.to_dict(questions),
        "config": config.to_dict(),
        "generation": {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "batch_size": batch_size},
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(str(model.device)),
        "compat": {finding.name: finding.repaired for finding in compat.check(model)},
    }


def _answer(
    model: Any,
    processor: Any,
    inputs: Any,
    batch: Sequence[Question],
    score: Score,
    handle: TrimHandle | None = None,
) -> None:
    generated = answering.generate(model, processor, inputs, max_new_tokens=MAX_NEW_TOKENS)
    score.seconds += generated.seconds
    score.right += [text in question["answers"] for text, question in zip(generated.texts, batch, strict=True)]
    if handle is None:
        score.kept += [1.0] * len(batch)
    else:
        score.kept += [images[0].kept_fraction for images in handle.report().samples]


def _kinds(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(question["kind"] for question in questions))


def _means(values: Sequence[float], kinds: Sequence[str]) -> dict[str, Any]:
    def mean(chosen: list[float]) -> float:
        return round(sum(chosen) / len(chosen), 4)

    per_kind = {
        kind: mean([value for value, of in zip(values, kinds, strict=True) if of == kind])
        for kind in dict.fromkeys(kinds)
    }
    return {"overall": mean(list(values)), "kinds": per_kind}
