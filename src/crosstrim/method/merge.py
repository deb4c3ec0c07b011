"""Merging: a kept feature stands for the dropped ones that are most like it. Ours; token merging (ToMe,
arXiv 2210.09461) does likewise inside vision towers.

A dropped feature joins the group of the kept feature of its image whose key in the first cross-attention layer has
the largest cosine with its own. The later layers then read each group's mean in place of the kept feature,

    f'(n) = sum over m in group n of  s(m) f(m)  /  sum over m in group n of  s(m)

with s the saliency summed over heads, and add log |group n| to the attention logits of f'(n). So a group of features
with one key and one value draws, and gives, what all of them would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag, normalize

from crosstrim.method.precision import full_precision


@dataclass(frozen=True)
class Groups:
    """Which feature stands for which.

    Attributes:
        into: [B, N] int64, the feature that stands for each: itself for those that stay, and for those that are in
            no group (nobody sees them, or nothing of their image stays).
        weights: [B, N] float32, each feature's part in the mean of its group; 1 for a group of one.
        sizes: [B, N] int64, how many features each stands for, itself included; 1 also for those that went.
    """

    into: torch.Tensor
    weights: torch.Tensor
    sizes: torch.Tensor

    @classmethod
    def singles(cls, like: torch.Tensor) -> Groups:
        """Every one of the features `like` [B, N] is a group of its own."""
        ones = torch.ones_like(like, dtype=torch.int64)
        return cls(ones.cumsum(-1) - 1, ones.float(), ones)

    @classmethod
    def of(cls, into: torch.Tensor, saliency: torch.Tensor) -> Groups:
        """The groups that `into` makes, weighted by `saliency` [B, N] float32; plainly where all of it is 0."""
        ends = into.new_full((len(into), 1), into.shape[1])
        sizes = torch.cat([_starts(into.sort(-1).values), ends], dim=1).diff()
        totals = torch.stack([_summed(*sample) for sample in zip(saliency.unsqueeze(-1), into, strict=True)])
        total, size = totals.squeeze(-1).gather(1, into), sizes.gather(1, into)
        weights = torch.where(total > 0, saliency / total, 1 / size.float())
        return cls(into, weights, sizes.clamp_min(1))

    def change(self, how: Callable[[torch.Tensor], torch.Tensor]) -> Groups:
        """The groups after `how` was done to each tensor."""
        return Groups(how(self.into), how(self.weights), how(self.sizes))

    def followed_by(self, newer: Groups) -> Groups:
        """These groups, then those of `newer` features."""
        pairs = (
            (self.into, newer.into + self.into.shape[1]),
            (self.weights, newer.weights),
            (self.sizes, newer.sizes),
        )
        return Groups(*(torch.cat([older, new.to(older.device)], dim=1) for older, new in pairs))

    def means(self, features: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Each group's weighted mean, computed in float32.

        Args:
            features: [B, N, hidden] of any float dtype.
            slots: [B, K] int64, the features whose groups are wanted.

        Returns:
            [B, K, hidden] in that dtype; zeros for a feature that went.
        """
        here = self.change(lambda tensor: tensor.to(features.device))
        samples = zip(features, here.into, here.weights, slots.to(features.device), strict=True)
        # One sample at a time: each needs its features in float32.
        return torch.stack([_summed(one, into, weights)[kept].to(one.dtype) for one, into, weights, kept in samples])

    def bias(self, slots: torch.Tensor) -> torch.Tensor:
        """[B, K] float32: what the features in `slots` [B, K] add to their attention logits."""
        return self.sizes.to(slots.device).gather(1, slots).float().log()


Counts = Sequence[Sequence[tuple[int, int]]]
"""Of each sample and image, how many features are visible, and how many of them stay."""


def counts_of(visible: torch.Tensor, kept: torch.Tensor, features_per_image: int) -> Counts:
    """The counts of `visible` [B, N] and `kept` [B, N] bool, by one look at the device that they are on."""
    both = torch.stack([visible, kept], -1).unflatten(1, (-1, features_per_image)).sum(2)
    return [[(seen, stays) for seen, stays in images] for images in both.tolist()]


@torch.no_grad()
def groups_of(
    keys: torch.Tensor,
    saliency: torch.Tensor,
    visible: torch.Tensor,
    kept: torch.Tensor,
    features_per_image: int,
    counts: Counts | None = None,
) -> Groups:
    """Let each visible feature that is dropped join the kept one of its image whose key is nearest by cosine.

    Ties go to the lower index.

    Args:
        keys: [B, Hkv, N, D] of all heads, which are compared as one vector.
        saliency: [B, Hq, N] float32 of all heads.
        visible: [B, N] bool.
        kept: [B, N] bool, among them.
        features_per_image: features of one image in N.
        counts: of `visible` and `kept`, where the host knows them; None: look.
    """
    counts = counts or counts_of(visible, kept, features_per_image)
    with full_precision(keys.device):
        directions = normalize(keys.float().transpose(1, 2).flatten(2), dim=-1)
        into = Groups.singles(kept).into.clone()
        # First what stays, then what goes, each in its order, then what nobody sees; image by image.
        rank = (2 * visible.to(torch.uint8) + kept).unflatten(1, (-1, features_per_image))
        places = rank.argsort(dim=-1, descending=True, stable=True)
        for sample, images in enumerate(counts):
            for image, (seen, stay) in enumerate(images):
                if 0 < stay < seen:
                    those = image * features_per_image + places[sample, image]
                    stays, goes = those[:stay], those[stay:seen]
                    cosines = directions[sample, goes] @ directions[sample, stays].T
                    into[sample, goes] = stays[cosines.argmax(-1)]
        return Groups.of(into, saliency.sum(1))


def _summed(rows: torch.Tensor, into: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sums in float32 of the rows [N, C] that go to the same place, [N, C]; in one order on every device."""
    in_order, order = into.sort(stable=True)
    own = None if weights is None else weights[order]
    return embedding_bag(order, rows.float(), _starts(in_order), mode="sum", per_sample_weights=own)


def _starts(in_order: torch.Tensor) -> torch.Tensor:
    """Where each of 0 .. N - 1 begins among the ascending numbers [..., N] int64, likewise."""
    numbers = torch.arange(in_order.shape[-1], device=in_order.device)
    return torch.searchsorted(in_order, numbers.expand_as(in_order).contiguous())
