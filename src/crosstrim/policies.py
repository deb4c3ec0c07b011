"""Who votes for which features: the paper's heads, and rivals to compare them with.

A policy turns the saliency of the first cross-attention layer into votes. `crosstrim.selection` then gives every
voter its top features and keeps the union, so a policy with one voter is a plain ranking.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Protocol

import torch

from crosstrim.errors import ConfigError


class Policy(Protocol):
    """Anything that maps saliency to votes."""

    def __call__(self, saliency: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Return votes [B, V, N], float: each of V voters' liking for each feature, higher first.

        Args:
            saliency: [B, Hq, N] float32, attention each feature drew in each query head.
            visible: [B, N] bool. What a voter says of invisible features is ignored.
        """
        ...


class Union:
    """The paper's rule: every query head is a voter (section 3 of Trimmed Llama)."""

    def __call__(self, saliency: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Return the saliency as it is."""
        return saliency


class Random:
    """A control: one voter with no opinion. The same draw for every sample, so batch mates do not matter.

    Args:
        seed: of the draw.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, saliency: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Return uniform noise, drawn on the CPU so that it is the same on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.rand(saliency.shape[-1], generator=generator)
        return noise.to(saliency.device).expand(saliency.shape[0], 1, -1)

    def __repr__(self) -> str:
        return f"Random(seed={self.seed})"


POLICIES: dict[str, Callable[[], Policy]] = {"random": Random, "union": Union}


def resolve(policy: str | Policy) -> Policy:
    """The policy of that name, or the callable itself.

    Raises:
        ConfigError: the name is unknown; the message suggests the nearest.
    """
    if callable(policy):
        return policy
    if policy not in POLICIES:
        near = difflib.get_close_matches(str(policy), POLICIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"policy={policy!r} is unknown; there are {', '.join(sorted(POLICIES))}.{hint}")
    return POLICIES[policy]()
