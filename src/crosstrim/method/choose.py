"""Which image features stay. This is the method; the rest of the package carries it out.

In the first cross-attention layer the text looks at every image feature. What it looks at there, it will look at in
the later layers too (Trimmed Llama, arXiv 2504.00557), so the choice is made once, there, and in three steps:

1. Score. Every query head deals out attention to the features it may see; a feature's score in a head is what it
   draws from all rating rows together (`crosstrim.saliency`).
2. Vote. A policy turns the scores into votes. The paper's rule makes every head a voter that likes what it looked at.
3. Select. Every voter names its top share `k` of an image's features, and the union stays; or, with `keep`, the
   features in the order of their best rank until an exact budget is full (`crosstrim.select`).

Whoever runs a model calls `choose` where the first cross-attention layer attends, drops the other features from that
layer's own cache, and hands only the kept ones to the later layers; with `merge` each stands for those that are most
like it (`method/merge.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from crosstrim.method import policies
from crosstrim.method.geometry import Geometry
from crosstrim.method.merge import Counts, Groups, counts_of, groups_of
from crosstrim.method.precision import full_precision
from crosstrim.method.saliency import saliency
from crosstrim.method.selection import budget_of, most_of, select

if TYPE_CHECKING:
    from crosstrim.config import TrimConfig


@dataclass(frozen=True)
class Processes:
    """The processes that share the heads (tensor parallelism); as it stands, one that holds all of them.

    Attributes:
        gather_heads: [B, own heads, ...] of each process to [B, all heads, ...] in every process.
        agree: to the same tensor in every process, for what is kept must not differ in a last bit.
    """

    gather_heads: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    agree: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Choice:
    """What stays of the images.

    Attributes:
        visible: [B, N] bool, features that a text row may see, now or later.
        kept: [B, N] bool, features among them that stay.
        votes: [B, V, N] of the voters, and
        evidence: what they went by; None where nobody was asked.
        processes: those that made the choice together.
    """

    visible: torch.Tensor
    kept: torch.Tensor
    votes: torch.Tensor | None = field(default=None, repr=False)
    evidence: policies.Evidence | None = field(default=None, repr=False)
    processes: Processes = field(default_factory=Processes, repr=False)

    def share(self, share: float) -> torch.Tensor:
        """[B, N] bool: the best `share` of what is kept, image by image, by the same votes."""
        if share == 1 or self.votes is None or self.evidence is None:
            return self.kept
        return select(self.votes, self.kept, keep=float(share), features_per_image=self.evidence.features_per_image)

    def groups(self, kept: torch.Tensor, counts: Counts | None = None) -> Groups | None:
        """Which of the features `kept` [B, N] stand for those that go; None where none goes.

        `counts` is as for `groups_of`.
        """
        if self.evidence is None:
            return None
        seen = self.evidence
        counts = counts or counts_of(self.visible, kept, seen.features_per_image)
        if all(visible == stay for visible, stay in chain.from_iterable(counts)):
            return None
        groups = groups_of(seen.keys, seen.saliency, self.visible, kept, seen.features_per_image, counts)
        return groups.change(self.processes.agree)


@torch.no_grad()
def choose(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    config: TrimConfig,
    *,
    geometry: Geometry,
    older: int = 0,
    real_rows: torch.Tensor | None = None,
    rating_rows: torch.Tensor | None = None,
    scale: float | None = None,
    processes: Processes | None = None,
) -> Choice:
    """Choose the features that stay, on what the first cross-attention layer attends with.

    Generated tokens see what the last row sees, so that row has a say in what is visible even where it is padding.

    Args:
        queries: [B, Hq, T, D] of the prompt's text rows, after the layer's query norm.
        keys: [B, Hkv, older + N, D], after its key norm. Query head h reads key head h * Hkv // Hq.
        values: [B, Hkv, older + N, D].
        visible: [B, T, older + N] bool, whether the text row may see the feature; or less of them, and also on
            the CPU as the rows below, as for `saliency`.
        config: how much stays, and who decides.
        geometry: of the model.
        older: features of earlier images, which come first. They take their part of the attention, and what stays of
            them was chosen before.
        real_rows: [B, T] bool, rows that hold a token and not padding; None: all.
        rating_rows: [B, T] bool, the real rows that rate; None: all of them.
        scale: factor on q·k before the softmax; None: D ** -0.5.
        processes: those that share the heads; each is given its own, and all return the same. None: this one has all.

    Returns:
        The choice among the last N features, beside the queries.

    Raises:
        InputError: shapes do not fit, or the policy returned something that is no vote.
    """
    real = visible.new_ones(visible.shape[:2]) if real_rows is None else real_rows
    looking = real.clone()
    looking[:, -1] = True
    seen = (visible & looking.unsqueeze(-1)).any(1)
    known = seen.repeat_interleave(keys.shape[2] // visible.shape[2], dim=-1)[:, older:]  # where the masks are
    seen = known.to(queries.device, non_blocking=True)
    size, processes = geometry.features_per_image, processes or Processes()
    if config.lossless:
        return Choice(seen, seen)
    knobs: dict[str, Any] = {"k": config.k, "keep": config.keep, "k_base": config.k_base}
    with full_precision(queries.device):
        rating = real if rating_rows is None else real & rating_rows
        scores = saliency(queries, keys, visible, rating_rows=rating, scale=scale)
        evidence = policies.Evidence(
            saliency=processes.gather_heads(scores[..., older:]),
            visible=seen,
            keys=processes.gather_heads(keys[:, :, older:].detach()),
            values=processes.gather_heads(values[:, :, older:].detach()),
            budget=budget_of(known.unflatten(-1, (-1, size)), **knobs),
            features_per_image=size,
            features_per_tile=geometry.features_per_tile,
            most=None if known.device.type == "cpu" else most_of(size, **knobs),
        )
        policy = config.voters()
        votes = policies.votes_of(policy, evidence)
        if config.k is None and config.keep is None:
            kept = policies.chosen_by(policy, evidence)
        else:
            kept = select(votes, seen, features_per_image=size, **knobs)
    return Choice(seen, processes.agree(kept), processes.agree(votes), evidence, processes)
