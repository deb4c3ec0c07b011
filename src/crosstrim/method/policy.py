"""What a policy is: it turns what the first cross-attention layer knows into votes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass

import torch

from crosstrim.errors import ConfigError, InputError


@dataclass(frozen=True)
class Evidence:
    """What a policy may look at.

    Attributes:
        saliency: [B, Hq, N] float32, attention each feature drew in each query head.
        visible: [B, N] bool. What a voter says of invisible features is ignored.
        keys: [B, Hkv, N, D], the first cross-attention layer's keys.
        values: [B, Hkv, N, D], its values.
        budget: [B, I] int64, how many visible features of each image a voter may name. It may be on the CPU while
            the others are on a device: whoever must know a number then need not wait for the device.
        features_per_image: features of one image; N = I * features_per_image.
        features_per_tile: features of one tile, the first of which is its class token.
        most: what no budget is above, for whoever must know a number without looking at a budget on a device; None:
            look.
    """

    saliency: torch.Tensor
    visible: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    budget: torch.Tensor
    features_per_image: int
    features_per_tile: int
    most: int | None = None


Voter = Callable[[Evidence], torch.Tensor]
"""Anything that maps evidence to votes; your own function does."""


class Policy(ABC):
    """A voter that may also say how much stays, or make later layers read less.

    Attributes:
        decides_alone: whether `chosen` can be asked, so that neither `k` nor `keep` is needed.
    """

    decides_alone: bool = False

    @abstractmethod
    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return votes [B, V, N], float: each of V voters' liking for each feature, higher first.

        The same evidence must get the same votes.
        """

    def chosen(self, evidence: Evidence) -> torch.Tensor:
        """[B, N] bool: the features that stay without any budget.

        Raises:
            ConfigError: the policy does not decide that.
        """
        raise ConfigError(f"policy {name_of(self)} does not say how many features stay; give k or keep with it.")

    def shares(self, followers: int) -> tuple[float, ...]:
        """What each of the later layers reads of the choice, from 0 to 1: all of it."""
        return (1.0,) * followers


class Own(Policy):
    """A voter of the caller's, with the methods of `Policy` that it happens to have.

    Args:
        voter: any callable.
    """

    def __init__(self, voter: Voter) -> None:
        self.voter = voter
        for name in ("chosen", "shares"):
            if callable(method := getattr(voter, name, None)):
                setattr(self, name, method)
        self.decides_alone = "chosen" in vars(self)

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the voter's votes."""
        return self.voter(evidence)


def name_of(policy: str | Voter) -> str:
    """What results call a policy: its name, or of one of your own where its code is, the same in every run."""
    if isinstance(policy, Own):
        policy = policy.voter
    if isinstance(policy, str):
        return policy
    code = policy if hasattr(policy, "__qualname__") else type(policy)
    return repr(policy) if is_dataclass(policy) and code is not policy else f"{code.__module__}.{code.__qualname__}"


def votes_of(policy: Voter, evidence: Evidence) -> torch.Tensor:
    """The policy's votes [B, V, N].

    Raises:
        InputError: it returned something else.
    """
    votes = policy(evidence)
    batch, features = evidence.visible.shape
    is_tensor = isinstance(votes, torch.Tensor)
    if not is_tensor or votes.dim() != 3 or votes.shape[::2] != (batch, features) or not votes.shape[1]:
        raise _returned(policy, votes, f"votes must be a tensor [{batch}, at least 1 voter, {features}]")
    return votes


def chosen_by(policy: Policy, evidence: Evidence) -> torch.Tensor:
    """The visible features [B, N] that a policy picks without any budget.

    Raises:
        InputError: it returned something else.
    """
    chosen = policy.chosen(evidence)
    if not isinstance(chosen, torch.Tensor) or (chosen.shape, chosen.dtype) != (evidence.visible.shape, torch.bool):
        raise _returned(policy, chosen, f"what is chosen must be a bool tensor {list(evidence.visible.shape)}")
    return chosen & evidence.visible.to(chosen.device)


def _returned(policy: Voter, what: object, wanted: str) -> InputError:
    met = f"{what.dtype} {list(what.shape)}" if isinstance(what, torch.Tensor) else repr(what)
    return InputError(f"policy {name_of(policy)} returned {met}, but {wanted}.")
