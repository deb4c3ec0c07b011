"""Generations without a cache, which pass the whole prompt again for every token: the prompt's choice is reused."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from crosstrim.trimming.kept import LayersKept

Rows = tuple[torch.Tensor | None, ...]
"""What a choice follows from beside the images, row by row, each [B, T, ...] or None: tokens, and what they see."""

Evidence = tuple[torch.Tensor, ...]
"""What the choice was made on, each of a size that does not depend on T."""

PROMPTS_PER_IMAGE = 16
"""Questions about one tensor of images that can be answered in turn; of more, the one used longest ago goes."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that decided what is `kept`."""

    rows: Rows
    evidence: Evidence
    kept: LayersKept

    @property
    def length(self) -> int:
        """Rows of the prompt."""
        return next(tensor.shape[1] for tensor in self.rows if tensor is not None)

    def begins(self, rows: Rows) -> bool:
        """Whether these rows are the prompt's, perhaps followed by more."""
        return all(
            one is other if one is None or other is None else torch.equal(one, other[:, : self.length].to(one.device))
            for one, other in zip(self.rows, rows, strict=True)
        )

    def rests_on(self, evidence: Evidence) -> bool:
        """Whether the evidence is what it was.

        Pixels, weights, adapters or the precision may have changed since, and whatever did shows here. Numbers may
        differ by what another number of rows does to a matrix product, half of their digits at the very most.
        """
        return all(
            was.shape == now.shape
            and bool(((was - now).abs() <= torch.finfo(now.dtype).eps ** 0.5 * was.abs().amax()).all())
            for was, now in zip(self.evidence, evidence, strict=True)
        )


class Uncached:
    """The prompts of generations without a cache, found by the identity of their images, which are weakly held."""

    def __init__(self) -> None:
        self._prompts = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def find(self, images: torch.Tensor, rows: Rows) -> Prompt | None:
        """The longest prompt about these images that `rows` continue."""
        with self._lock:
            held: list[Prompt] = list(self._prompts.get(images, ()))
        return max((prompt for prompt in held if prompt.begins(rows)), key=lambda prompt: prompt.length, default=None)

    def remember(self, images: torch.Tensor, rows: Rows, evidence: Evidence, kept: LayersKept) -> None:
        """Keep the choice for as long as the image tensor lives."""
        prompt = Prompt(tuple(None if one is None else one.detach().clone() for one in rows), evidence, kept)
        with self._lock:
            held: list[Prompt] = self._prompts.get(images, [])
            others = [one for one in held if not (one.begins(rows) and prompt.begins(one.rows))]
            self._prompts[images] = [*others, prompt][-PROMPTS_PER_IMAGE:]
