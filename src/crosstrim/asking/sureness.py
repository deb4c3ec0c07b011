"""How sure a model was of an answer: the lowest probability that it gave to a token of it. Ours.

On mini it tells changed answers from others, where nothing that is known at the prompt does (docs/calibration.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Sureness(NamedTuple):
    """Of one answer: the lowest probability of its tokens, and how many there are, the one that ends it included."""

    lowest_probability: float
    tokens: int


class LowestProbability:
    """A logits processor for `generate` that changes nothing and remembers the lowest probability of each sample.

    Probabilities are those of the model's distribution before temperature and other warpers, in float32. The token
    that ends an answer counts, as it decides where the answer ends; what is padded behind it does not.

    Args:
        ends: ids of the tokens that end an answer.
    """

    def __init__(self, ends: Iterable[int]) -> None:
        self._ends = torch.tensor(sorted(ends))
        self._lowest: torch.Tensor | None = None  # [B] log-probabilities so far
        self._counts: torch.Tensor | None = None  # [B] of tokens so far
        self._ended: torch.Tensor | None = None
        self._next: torch.Tensor | None = None  # [B, V], of the token that is about to be taken

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take in the token that was taken last, [B, T], and the scores of the next, [B, V], which are returned."""
        self._take(tokens)
        self._next = scores.float().log_softmax(-1)
        return scores

    def of(self, tokens: torch.Tensor) -> list[Sureness]:
        """Per sample what its answer came to.

        Args:
            tokens: [B, T], what `generate` returned.
        """
        self._take(tokens)
        self._next = None
        if self._lowest is None or self._counts is None:
            return []
        return [Sureness(*one) for one in zip(self._lowest.exp().tolist(), self._counts.tolist(), strict=True)]

    def _take(self, tokens: torch.Tensor) -> None:
        if self._next is None:
            return
        taken = tokens[:, -1]
        if self._lowest is None or self._counts is None or self._ended is None:
            self._lowest = self._next.new_zeros(len(taken))
            self._counts = torch.zeros_like(taken)
            self._ended = torch.zeros_like(taken, dtype=torch.bool)
            self._ends = self._ends.to(taken.device)
        own = self._next.gather(-1, taken.unsqueeze(-1)).squeeze(-1)
        self._lowest = torch.where(self._ended, self._lowest, torch.minimum(self._lowest, own))
        self._counts = self._counts + ~self._ended
        self._ended = self._ended | torch.isin(taken, self._ends)


def ends_of(model: object) -> frozenset[int]:
    """Ids of the tokens with which the model ends an answer.

    Args:
        model: of `crosstrim.load`.
    """
    ends = model.generation_config.eos_token_id  # type: ignore[attr-defined]
    return frozenset([ends] if isinstance(ends, int) else ends or ())
