"""What a run is judged by: right answers, agreement with the untrimmed model, and how far chance could move them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
_SEED = 0
_CHUNK = 64  # resamples drawn at a time, so that large datasets fit


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is one of the answers, but for case, white space around it and one full stop at its end."""
    return _plain(text) in {_plain(answer) for answer in answers}


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def divergence(untrimmed: torch.Tensor, trimmed: torch.Tensor) -> torch.Tensor:
    """KL divergence of next-token distributions, in nats: what is lost by predicting as `trimmed` does.

    Args:
        untrimmed: [B, V] logits.
        trimmed: [B, V] logits.

    Returns:
        [B] float64, KL(untrimmed || trimmed), not negative.
    """
    reference, other = untrimmed.double().log_softmax(-1), trimmed.double().log_softmax(-1)
    # A token that both rule out counts nothing, where 0 * (inf - inf) would be no number.
    terms = torch.where(reference == -torch.inf, 0.0, reference.exp() * (reference - other))
    return terms.sum(-1).clamp_min(0)


@dataclass(frozen=True)
class Estimate:
    """A mean over questions, and the band in which 95 % of its bootstrap resamples lie.

    Attributes:
        mean: over the questions.
        low: 2.5th percentile of the resampled means.
        high: 97.5th percentile.
    """

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """The three numbers, rounded to what is worth keeping."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()}


def bootstrap(values: NDArray[np.float64], resamples: int = RESAMPLES) -> list[Estimate]:
    """Percentile bootstrap over questions; all columns see the same resamples, and so does every call.

    Args:
        values: [questions, columns], at least one question.
        resamples: how often to draw as many questions with replacement.

    Returns:
        One estimate per column.
    """
    count = len(values)
    generator = np.random.default_rng(_SEED)
    shares = np.full(count, 1 / count)
    means = [
        generator.multinomial(count, shares, size=min(_CHUNK, resamples - start)) @ values / count
        for start in range(0, resamples, _CHUNK)
    ]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    return [
        Estimate(float(mean), float(below), float(above))
        for mean, below, above in zip(values.mean(0), low, high, strict=True)
    ]
