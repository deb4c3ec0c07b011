"""Who votes for which features: the paper's heads, and rivals that weigh, diversify or ignore what the heads say.

A policy turns what the first cross-attention layer knows into votes. `crosstrim.select` then gives every voter
its top features and keeps the union, so a policy with one voter is a plain ranking. All of them obey `k` and `keep`,
treat every sample alone and draw nothing without a seed.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch

from crosstrim.errors import ConfigError, InputError
from crosstrim.method import greedy
from crosstrim.method.names import BUDGETED as BUDGETED
from crosstrim.method.names import ORACLE
from crosstrim.method.names import PAPER as PAPER
from crosstrim.method.policy import Evidence as Evidence
from crosstrim.method.policy import Own as Own
from crosstrim.method.policy import Policy as Policy
from crosstrim.method.policy import Voter as Voter
from crosstrim.method.policy import chosen_by as chosen_by
from crosstrim.method.policy import name_of as name_of
from crosstrim.method.policy import votes_of as votes_of


@dataclass(frozen=True)
class Union(Policy):
    """The paper's rule: every query head is a voter."""

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the saliency as it is."""
        return evidence.saliency


@dataclass(frozen=True)
class Mean(Policy):
    """One ranking by the attention averaged over heads and rows, as FastV ranks tokens (arXiv 2403.06764)."""

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the mean over heads."""
        return evidence.saliency.mean(1, keepdim=True)


@dataclass(frozen=True)
class Value(Policy):
    """Every query head votes by what a feature adds to its output: attention times the norm of the value."""

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return saliency weighted by value norms."""
        norms = torch.linalg.vector_norm(evidence.values.float(), dim=-1)
        group = evidence.saliency.shape[1] // norms.shape[1]
        weighted: torch.Tensor = evidence.saliency * norms.repeat_interleave(group, dim=1)
        return weighted


@dataclass(frozen=True)
class Random(Policy):
    """A control: one voter with no opinion. The same draw for every sample, so batch mates do not matter.

    Attributes:
        seed: of the draw, a whole number from 0; "random:3" says it as a float.
    """

    seed: float = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63 or self.seed != int(self.seed):
            raise ConfigError(f"seed={self.seed!r} must be a whole number from 0 to 2**63 - 1.")

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return uniform noise, drawn on the CPU so that it is the same on every device."""
        visible = evidence.visible
        seeded = torch.Generator("cpu").manual_seed(int(self.seed))
        noise = torch.rand(visible.shape[1], generator=seeded, dtype=torch.float32, device="cpu")
        return noise.to(visible.device, non_blocking=True).expand(visible.shape[0], 1, -1)


@dataclass(frozen=True)
class Grid(Policy):
    """A control: features spread evenly over every tile, whatever the picture shows.

    Patches are taken in an order that stays even at any length: the plane's golden-ratio sequence (R2), each point
    claiming the nearest patch that is left. Class tokens come first.
    """

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the same ranking for every tile."""
        tile = -_even_order(evidence.features_per_tile - 1)
        tile = torch.cat([tile.new_ones(1), tile]).to(evidence.visible.device, non_blocking=True)
        batch, count = evidence.visible.shape
        return tile.repeat(count // len(tile)).expand(batch, 1, -1)


@dataclass(frozen=True, eq=False)
class Given(Policy):
    """Votes that were cast elsewhere, for one certain batch of prompts.

    Attributes:
        votes: [B, V, N].
    """

    votes: torch.Tensor = field(repr=False)

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the votes.

        Raises:
            InputError: they were cast for another batch.
        """
        batch, features = evidence.visible.shape
        if self.votes.dim() != 3 or self.votes.shape[::2] != (batch, features):
            raise InputError(
                f"votes of shape {tuple(self.votes.shape)} do not fit {batch} samples of {features} image features; "
                "give votes [B, V, N] for this very batch."
            )
        return self.votes.to(evidence.visible.device)


@dataclass(frozen=True)
class Mass(Policy):
    """Per head the fewest features that hold a share of its attention; concentrated heads name fewer.

    With `k` or `keep` the features come in the order of the smallest share that would include them.

    Attributes:
        p: share of a head's attention that must be held, in (0, 1].
    """

    p: float = 0.9

    @property
    def decides_alone(self) -> bool:  # type: ignore[override]  # nobody sets it here
        """Yes: the share `p` itself picks."""
        return True

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ConfigError(f"p={self.p!r} must be a share of the attention above 0 and at most 1.")

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return minus the smallest share, over heads, that includes each feature."""
        return -self._held_before(evidence).amin(1, keepdim=True)

    def chosen(self, evidence: Evidence) -> torch.Tensor:
        """[B, N] bool: the features that the share `p` itself picks, without any budget."""
        return ((self._held_before(evidence) < self.p).any(1)) & evidence.visible

    def _held_before(self, evidence: Evidence) -> torch.Tensor:
        """[B, Hq, N]: share of its image's attention that a head has spent before it comes to each feature."""
        votes = evidence.saliency.masked_fill(~evidence.visible.unsqueeze(1), 0.0)
        votes = votes.unflatten(-1, (-1, evidence.features_per_image))
        ordered, order = votes.sort(dim=-1, descending=True, stable=True)
        before = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True).clamp_min(1e-30)
        return torch.empty_like(before).scatter_(-1, order, before).flatten(-2)


@dataclass(frozen=True)
class MaximalMarginalRelevance(Policy):
    """Relevance minus redundancy: greedily the feature with the best mean attention less its likeness to those taken.

    Likeness is the largest cosine between the leader's keys (see `method.greedy`). Relevance is the mean saliency
    as a share of the image's largest.

    Attributes:
        balance: weight of relevance in [0, 1]; the rest weighs redundancy.
    """

    balance: float = 0.5

    def __post_init__(self) -> None:
        _check_balance(self.balance)

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return minus the place in which each feature is taken."""
        return _greedily(evidence, partial(greedy.marginal_relevance, balance=self.balance))


@dataclass(frozen=True)
class Contribution(Policy):
    """Maximal marginal relevance of what features add to the layer's output, which is attention times value. Ours.

    As `MaximalMarginalRelevance`, but relevance is the saliency times the value's norm, averaged over heads, and
    likeness is the cosine between values: two features are redundant when they add the same, whatever attracts the
    attention to them, and one that draws attention but adds nothing (an attention sink) is not relevant.

    Attributes:
        balance: weight of relevance in [0, 1]; the rest weighs redundancy.
    """

    balance: float = 0.5

    def __post_init__(self) -> None:
        _check_balance(self.balance)

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return minus the place in which each feature is taken."""
        added = replace(evidence, saliency=Value()(evidence), keys=evidence.values)
        return _greedily(added, partial(greedy.marginal_relevance, balance=self.balance))


@dataclass(frozen=True)
class DeterminantalPointProcess(Policy):
    """Greedy MAP of a determinantal point process whose quality is the saliency (as in CDPruner, arXiv 2506.10967).

    Attributes:
        width: how alike two features must be to count as the same, above 0; smaller forgives more.
    """

    width: float = 0.3

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ConfigError(f"width={self.width!r} must be above 0.")

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return minus the place in which each feature is taken."""
        return _greedily(evidence, partial(greedy.determinantal, width=self.width))


def _check_balance(balance: float) -> None:
    if not 0 <= balance <= 1:
        raise ConfigError(f"balance={balance!r} must be a weight from 0 to 1.")


def _greedily(evidence: Evidence, take: greedy.Take) -> torch.Tensor:
    """Votes [B, 1, N] from a greedy choice within each image."""
    size = evidence.features_per_image

    keys = evidence.keys.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)  # [B * I, Hkv, F, D], a copy if I > 1
    relevance, visible = evidence.saliency.mean(1).view(-1, size), evidence.visible.view(-1, size)
    budget = evidence.budget.flatten()
    steps = max(budget.tolist(), default=0) if evidence.most is None else evidence.most
    votes = greedy.order(relevance, visible, keys, budget, steps, take)
    return votes.view(len(evidence.visible), 1, -1)


@dataclass(frozen=True)
class Pyramid(Policy):
    """Another policy's votes, or its own choice, with every later layer dropping some more of what it chose.

    The first of the later layers reads all of the choice and the last one a share of it; between them the share
    falls evenly. What a layer reads is part of what the layer before it reads.

    Attributes:
        last: share of the choice that the last layer still reads, in (0, 1].
        policy: who votes.
    """

    last: float = 0.5
    policy: Voter = Union()

    def __post_init__(self) -> None:
        if not 0 < self.last <= 1:
            raise ConfigError(f"last={self.last!r} must be a share above 0 and at most 1.")

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the votes of the policy within."""
        return self.policy(evidence)

    @property
    def decides_alone(self) -> bool:  # type: ignore[override]  # nobody sets it here
        """Whether the policy within does."""
        return voter(self.policy).decides_alone

    def chosen(self, evidence: Evidence) -> torch.Tensor:
        """[B, N] bool: what the policy within picks without any budget."""
        return voter(self.policy).chosen(evidence)

    def shares(self, followers: int) -> tuple[float, ...]:
        """What each of the later layers reads of the choice."""
        step = (1 - self.last) / max(followers - 1, 1)
        return tuple(max(round(1 - step * place, 9), 1e-9) for place in range(followers))


@lru_cache(maxsize=4)
def _even_order(patches: int) -> torch.Tensor:
    """[patches] float32: place of each patch of a square tile in an order that covers it evenly at any length."""
    side = math.isqrt(patches)
    step = torch.tensor([0.7548776662466927, 0.5698402909980532], dtype=torch.float64, device="cpu")
    free = torch.ones(side, side, dtype=torch.bool, device="cpu")
    axis = (torch.arange(side, dtype=torch.float64, device="cpu") + 0.5) / side
    places = torch.empty(side, side, dtype=torch.float32, device="cpu")
    for place in range(side * side):
        point = (0.5 + place * step) % 1
        distance = (axis[:, None] - point[0]).square() + (axis[None] - point[1]).square()
        row, column = divmod(int(distance.masked_fill(~free, torch.inf).argmin()), side)
        free[row, column] = False
        places[row, column] = place
    return places.flatten()


POLICIES: dict[str, Callable[..., Policy]] = {
    "contribution": Contribution,
    "dpp": DeterminantalPointProcess,
    "grid": Grid,
    "mass": Mass,
    "mean": Mean,
    "mmr": MaximalMarginalRelevance,
    "pyramid": Pyramid,
    "random": Random,
    "union": Union,
    "value": Value,
}


def resolve(policy: str | Voter, *, others: Sequence[str] = ()) -> Voter:
    """The policy of that name, or the callable itself. A number may follow the name: "mass:0.9", "random:3".

    Args:
        policy: a name or a callable.
        others: names that the caller knows beside these, for the message.

    Raises:
        ConfigError: the name is unknown, which suggests the nearest, or that of the oracle, or takes no number, or
            not that one.
    """
    if callable(policy):
        return policy
    name, colon, text = str(policy).partition(":")
    if name == ORACLE and ORACLE not in others:
        raise ConfigError(
            f"policy={policy!r} looks ahead, at what later layers attend to while the untrimmed model answers, so no "
            f"trim can go by it; compare with it by `crosstrim eval --out FILE.json --policy {ORACLE}`, or choose "
            f"one of {', '.join(sorted(POLICIES))}."
        )
    if name not in POLICIES:
        known = sorted({*POLICIES, *others})
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "One of your own is given as the callable, not by a name."
        raise ConfigError(f"policy={policy!r} is unknown; there are {', '.join(known)}. {hint}")
    if not colon:
        return POLICIES[name]()
    if not inspect.signature(POLICIES[name]).parameters:
        raise ConfigError(f"policy={policy!r}: {name!r} takes no number; leave out {':' + text!r}.")
    try:
        return POLICIES[name](float(text))
    except ConfigError as error:
        raise ConfigError(f"policy={policy!r}: {error}") from None
    except ValueError as error:
        raise ConfigError(
            f"policy={policy!r}: {text!r} is no number; leave out {':' + text!r} or give one."
        ) from error


def voter(policy: str | Voter) -> Policy:
    """The policy of that name, or the callable as a policy.

    Raises:
        ConfigError: as `resolve`.
    """
    found = resolve(policy)
    return found if isinstance(found, Policy) else Own(found)
