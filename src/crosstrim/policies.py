"""Who votes for which features: the paper's heads, and rivals that weigh, diversify or ignore what the heads say.

A policy turns what the first cross-attention layer knows into votes. `crosstrim.selection` then gives every voter
its top features and keeps the union, so a policy with one voter is a plain ranking. All of them obey `k` and `keep`,
treat every sample alone and draw nothing without a seed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F

from crosstrim.errors import ConfigError, InputError


@dataclass(frozen=True)
class Evidence:
    """What a policy may look at.

    Attributes:
        saliency: [B, Hq, N] float32, attention each feature drew in each query head.
        visible: [B, N] bool. What a voter says of invisible features is ignored.
        keys: [B, Hkv, N, D], the first cross-attention layer's keys.
        values: [B, Hkv, N, D], its values.
        budget: [B, I] int64, how many features of each image a voter may name.
        features_per_image: features of one image; N = I * features_per_image.
        features_per_tile: features of one tile, the first of which is its class token.
    """

    saliency: torch.Tensor
    visible: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    budget: torch.Tensor
    features_per_image: int
    features_per_tile: int


class Policy(Protocol):
    """Anything that maps evidence to votes; your own callable does.

    A policy that can decide without `k` and `keep` also has a method `chosen(evidence)`, which returns the features
    that stay as [B, N] bool. One that has a method `shares(followers)` makes later layers read less and less.
    """

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return votes [B, V, N], float: each of V voters' liking for each feature, higher first."""
        ...


@dataclass(frozen=True)
class Union:
    """The paper's rule: every query head is a voter."""

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the saliency as it is."""
        return evidence.saliency


@dataclass(frozen=True)
class Mean:
    """One ranking by the attention averaged over heads and rows, as FastV ranks tokens (arXiv 2403.06764)."""

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the mean over heads."""
        return evidence.saliency.mean(1, keepdim=True)


@dataclass(frozen=True)
class Value:
    """Every query head votes by what a feature adds to its output: attention times the norm of the value."""

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return saliency weighted by value norms."""
        norms = torch.linalg.vector_norm(evidence.values.float(), dim=-1)
        group = evidence.saliency.shape[1] // norms.shape[1]
        weighted: torch.Tensor = evidence.saliency * norms.repeat_interleave(group, dim=1)
        return weighted


@dataclass(frozen=True)
class Random:
    """A control: one voter with no opinion. The same draw for every sample, so batch mates do not matter.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return uniform noise, drawn on the CPU so that it is the same on every device."""
        visible = evidence.visible
        noise = torch.rand(visible.shape[1], generator=torch.Generator().manual_seed(int(self.seed)))
        return noise.to(visible.device).expand(visible.shape[0], 1, -1)


@dataclass(frozen=True)
class Grid:
    """A control: features spread evenly over every tile, whatever the picture shows.

    Patches are taken in an order that stays even at any length: the plane's golden-ratio sequence (R2), each point
    claiming the nearest patch that is left. Class tokens come first.
    """

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the same ranking for every tile."""
        tile = -_even_order(evidence.features_per_tile - 1)
        tile = torch.cat([torch.ones(1), tile]).to(evidence.visible.device)
        batch, count = evidence.visible.shape
        return tile.repeat(count // len(tile)).expand(batch, 1, -1)


@dataclass(frozen=True, eq=False)
class Given:
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
class Mass:
    """Per head the fewest features that hold a share of its attention; concentrated heads name fewer.

    With `k` or `keep` the features come in the order of the smallest share that would include them.

    Attributes:
        p: share of a head's attention that must be held, in (0, 1].
    """

    p: float = 0.9

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
class MaximalMarginalRelevance:
    """Relevance minus redundancy: greedily the feature with the best mean attention less its likeness to those taken.

    Likeness is the cosine between the leader's keys (sketched, see `_sketch`). Relevance is the mean saliency as a
    share of the image's largest.

    Attributes:
        balance: weight of relevance in [0, 1]; the rest weighs redundancy.
    """

    balance: float = 0.5

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return minus the place in which each feature is taken."""
        return _greedily(evidence, self._take)

    def _take(self, relevance: torch.Tensor, sketch: torch.Tensor, count: int) -> torch.Tensor:
        gain = self.balance * relevance
        redundancy = torch.full_like(relevance, -1.0)
        taken = torch.empty(count, dtype=torch.long, device=relevance.device)
        for place in range(count):
            best = (gain - (1 - self.balance) * redundancy).argmax()
            taken[place] = best
            torch.maximum(redundancy, sketch @ sketch[best], out=redundancy)
            gain[best] = -torch.inf
        return taken


@dataclass(frozen=True)
class DeterminantalPointProcess:
    """Greedy MAP of a determinantal point process whose quality is the saliency (as in CDPruner, arXiv 2506.10967).

    The kernel is q_i * exp((cos_ij - 1) / width) * q_j with cos over the sketched keys; the exponential keeps it of
    full rank. The greedy algorithm is the incremental Cholesky one of Chen et al. (arXiv 1709.05135).

    Attributes:
        width: how alike two features must be to count as the same; smaller forgives more.
    """

    width: float = 0.3

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return minus the place in which each feature is taken."""
        return _greedily(evidence, self._take)

    def _take(self, relevance: torch.Tensor, sketch: torch.Tensor, count: int) -> torch.Tensor:
        quality = relevance.clamp_min(1e-6)
        variance = quality.square()
        rows = relevance.new_zeros(count, len(relevance))
        taken = torch.empty(count, dtype=torch.long, device=relevance.device)
        for place in range(count):
            best = variance.argmax()
            taken[place] = best
            alike = torch.exp((sketch @ sketch[best] - 1) / self.width) * quality * quality[best]
            known = rows[:place, best] @ rows[:place]
            row = (alike - known) / variance[best].clamp_min(1e-20).sqrt()
            rows[place] = row
            variance = variance - row.square()
            variance[taken[: place + 1]] = -torch.inf
        return taken


@dataclass(frozen=True)
class Pyramid:
    """Another policy's votes, with every later layer dropping some more of what it chose.

    The first of the later layers reads all of the choice and the last one a share of it; between them the share
    falls evenly. What a layer reads is part of what the layer before it reads.

    Attributes:
        last: share of the choice that the last layer still reads, in (0, 1].
        policy: who votes.
    """

    last: float = 0.5
    policy: Policy = Union()

    def __post_init__(self) -> None:
        if not 0 < self.last <= 1:
            raise ConfigError(f"last={self.last!r} must be a share above 0 and at most 1.")

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        """Return the votes of the policy within."""
        return self.policy(evidence)

    def shares(self, followers: int) -> tuple[float, ...]:
        """What each of the later layers reads of the choice."""
        step = (1 - self.last) / max(followers - 1, 1)
        return tuple(round(1 - step * place, 9) for place in range(followers))


POOL = 4
"""Greedy policies choose among this many times the budget, the most relevant ones: the rest could not win."""

SKETCH = 64
"""Dimensions that keys are projected to before they are compared, when they have more."""


def _greedily(evidence: Evidence, take: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """Votes [B, 1, N] from a greedy choice within each image; what it does not reach follows by relevance."""
    batch, _, count = evidence.saliency.shape
    size = evidence.features_per_image
    relevance = evidence.saliency.mean(1).masked_fill(~evidence.visible, -1.0)
    votes = torch.empty_like(relevance)
    for sample in range(batch):
        for image in range(count // size):
            span = slice(image * size, (image + 1) * size)
            own = relevance[sample, span]
            order = own.argsort(descending=True, stable=True)
            seen = int(evidence.visible[sample, span].sum())
            budget = min(int(evidence.budget[sample, image]), seen)
            pool = order[: min(seen, POOL * budget)].sort().values  # by index, so that ties go to the lower one
            scale = own.max().clamp_min(1e-30)
            taken = pool[take(own[pool] / scale, _sketch(evidence.keys[sample, :, span][:, pool]), budget)]
            rest = torch.full_like(own, True, dtype=torch.bool).index_fill_(0, taken, False)
            order = torch.cat([taken, order[rest[order]]])
            places = torch.arange(size, dtype=votes.dtype, device=votes.device)
            votes[sample, span] = torch.empty_like(places).index_copy_(0, order, -places)
    return votes.unsqueeze(1)


def _sketch(keys: torch.Tensor) -> torch.Tensor:
    """Unit vectors [N, S] whose products approximate the cosines between features' keys [Hkv, N, D].

    The keys of all heads stand side by side, each head's scaled to unit length; more than `SKETCH` dimensions are
    projected at random (Johnson-Lindenstrauss), with a fixed seed.
    """
    joined = F.normalize(keys.float(), dim=-1).transpose(0, 1).flatten(1)
    if joined.shape[1] > SKETCH:
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(joined.shape[1], SKETCH, generator=generator)
        joined = joined @ projection.to(joined.device)
    return F.normalize(joined, dim=-1)


@lru_cache(maxsize=4)
def _even_order(patches: int) -> torch.Tensor:
    """[patches] float: place of each patch of a square tile in an order that covers it evenly at any length."""
    side = math.isqrt(patches)
    step = torch.tensor([0.7548776662466927, 0.5698402909980532], dtype=torch.float64)
    free = torch.ones(side, side, dtype=torch.bool)
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    places = torch.empty(side, side)
    for place in range(side * side):
        point = (0.5 + place * step) % 1
        distance = (axis[:, None] - point[0]).square() + (axis[None] - point[1]).square()
        row, column = divmod(int(distance.masked_fill(~free, torch.inf).argmin()), side)
        free[row, column] = False
        places[row, column] = place
    return places.flatten()


POLICIES: dict[str, Callable[..., Policy]] = {
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


def resolve(policy: str | Policy) -> Policy:
    """The policy of that name, or the callable itself. A number may follow the name: "mass:0.9", "random:3".

    Raises:
        ConfigError: the name is unknown, which suggests the nearest, or takes no such number.
    """
    if callable(policy):
        return policy
    name, colon, number = str(policy).partition(":")
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"policy={policy!r} is unknown; there are {', '.join(sorted(POLICIES))}.{hint}")
    try:
        return POLICIES[name](float(number)) if colon else POLICIES[name]()
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"policy={policy!r}: {name!r} takes no number {number!r}.") from error
