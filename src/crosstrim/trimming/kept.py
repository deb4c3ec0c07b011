"""What one conversation's image features were trimmed to: indices that turn full-length masks into short ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from crosstrim.method.merge import Groups


@dataclass(frozen=True)
class Kept:
    """The kept features of a batch, counted through all images of the conversation.

    Samples keep different numbers of features; shorter ones are filled up with slots that are not `occupied`
    and that every mask hides.
    """

    visible: torch.Tensor  # [B, N] bool, features that some text row may see
    kept: torch.Tensor  # [B, N] bool, features that stay
    slots: torch.Tensor  # [B, K] int64, the feature behind each slot of the trimmed caches
    occupied: torch.Tensor  # [B, K] bool, False where a slot only fills up
    counts: tuple[int, ...] | None  # that each keeps, where they come before all slots that only fill up; else None
    groups: Groups | None = None  # which of the kept features stand for dropped ones; None: dropped is dropped
    drew: torch.Tensor | None = None  # [B, Hq, N'] float32, what those of the first images drew, where scored

    @classmethod
    def of(cls, kept: torch.Tensor, visible: torch.Tensor, counts: tuple[int, ...] | None = None) -> Kept:
        """The state in which `kept` [B, N] of the `visible` [B, N] features stay, in their order.

        `counts` says how many each sample keeps, where the host knows it; None: look.
        """
        counted = kept.sum(-1)
        counts = tuple(counted.tolist()) if counts is None else counts
        length = max(1, *counts)  # One slot at least: attention over no key at all is undefined.
        order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        # With strides of its own, which compiled code looks at.
        slots = order[:, :length].clone(memory_format=torch.contiguous_format)
        # A sample that keeps nothing reads one feature, and the same one whatever its batch mates keep.
        occupied = torch.arange(length, device=kept.device) < counted.clamp_min(1).unsqueeze(-1)
        return cls(visible, kept, slots, occupied, counts)

    @classmethod
    def everything(cls, batch: int, count: int, device: torch.device) -> Kept:
        """The state in which each of `count` features stays in each of `batch` samples."""
        everything = torch.ones(batch, count, dtype=torch.bool, device=device)
        slots = torch.arange(count, device=device).expand(batch, -1)
        return cls(everything, everything, slots, everything, (count,) * batch)

    @property
    def feature_count(self) -> int:
        """Features of the whole conversation before trimming, padding included."""
        return self.kept.shape[1]

    @property
    def length(self) -> int:
        """Slots per sample in the trimmed caches."""
        return self.slots.shape[1]

    @cached_property
    def rectangular(self) -> bool:
        """Whether every slot is occupied."""
        return self.counts is not None and set(self.counts) == {self.length}

    @property
    def complete(self) -> bool:
        """Whether nothing is missing and everything is where it was."""
        return self.rectangular and self.length == self.feature_count

    def extended(self, newer: Kept) -> Kept:
        """This state followed by that of images appended later."""
        counts = None
        if self.rectangular and newer.counts is not None:
            counts = tuple(self.length + count for count in newer.counts)
        groups = None
        if self.groups or newer.groups:
            older_groups, newer_groups = (one.groups or Groups.singles(one.kept) for one in (self, newer))
            groups = older_groups.followed_by(newer_groups)

        def joined(older: torch.Tensor, newer: torch.Tensor) -> torch.Tensor:
            return torch.cat([older, newer.to(older.device)], dim=1)

        return replace(
            self,
            visible=joined(self.visible, newer.visible),
            kept=joined(self.kept, newer.kept),
            slots=joined(self.slots, newer.slots + self.feature_count),
            occupied=joined(self.occupied, newer.occupied),
            counts=counts,
            groups=groups,
        )

    def batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Kept:
        """The state after `change` reordered, repeated or picked samples along dimension 0."""
        slots, counts = change(self.slots), self.counts
        if self.rectangular:  # then nobody needs to look which samples they are
            counts = (self.length,) * len(slots)
        elif counts is not None:
            counts = tuple(change(torch.tensor(counts, device="cpu")).tolist())
        return replace(
            self,
            visible=change(self.visible),
            kept=change(self.kept),
            slots=slots,
            occupied=change(self.occupied),
            counts=counts,
            groups=self.groups and self.groups.change(change),
            drew=None if self.drew is None else change(self.drew),
        )

    def padded(self, length: int) -> Kept:
        """The same kept features in `length` slots, those at the end only filled up."""
        pad, missing = torch.nn.functional.pad, (0, length - self.length)
        return replace(self, slots=pad(self.slots, missing), occupied=pad(self.occupied, missing))

    def trim_features(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, hidden] to [B, K, hidden]: what was kept, or the means of what it stands for."""
        if self.groups is not None:
            return self.groups.means(features, self.slots)
        slots = self.slots.to(features.device).unsqueeze(-1)
        return features.gather(1, slots.expand(-1, -1, features.shape[-1]))

    def trim_visible(self, visible: torch.Tensor) -> torch.Tensor:
        """[B, T, N] bool, what text rows may see, to [B, T, K]."""
        slots, occupied = self.slots.to(visible.device), self.occupied.to(visible.device)
        return visible.gather(-1, slots.unsqueeze(1).expand(-1, visible.shape[1], -1)) & occupied.unsqueeze(1)

    def trim_mask(self, mask: torch.Tensor | None, rows: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The additive mask [B, 1, T, N] over all features as one [B, 1, T, K] over the slots.

        None, which hides nothing, stays None when every slot is occupied and stands for nothing but itself. Compiled
        code always has a mask, by tensors alone, so that one graph serves every choice of the same length.
        """
        if mask is not None:
            slots = self.slots.to(mask.device)[:, None, None]
            mask = mask.gather(-1, slots.expand(-1, 1, mask.shape[2], -1))
        if not torch.compiler.is_dynamo_compiling() and self.rectangular and self.groups is None:
            return mask
        if mask is None:
            mask = torch.zeros(len(self.slots), 1, rows, self.length, dtype=dtype, device=self.slots.device)
        bias = self.bias(mask)
        mask = mask if bias is None else mask + bias[:, None, None]
        return mask.masked_fill(~self.occupied.to(mask.device)[:, None, None], torch.finfo(mask.dtype).min)

    def bias(self, like: torch.Tensor) -> torch.Tensor | None:
        """[B, K], `like` a tensor: what every row adds to the attention logits of the slots; None for nothing."""
        return None if self.groups is None else self.groups.bias(self.slots).to(like)

    def readable(self, mask: torch.Tensor | None, hides: bool | None = None) -> tuple[int, ...] | None:
        """How many features each sample reads, if that is all that the `mask` of `trim_mask` says beside the `bias`.

        `hides` says whether the mask hides a kept feature from some row, where the host knows it; None: look.

        Returns:
            Counts from the first slot on, at least 1 each (a sample that keeps nothing has rows that see nothing,
            whatever they read); None where the mask hides a kept feature from some row, or cannot be looked into.
        """
        if self.counts is None or hides or (mask is not None and mask.is_meta):
            return None
        if mask is not None and hides is None:
            bias = self.bias(mask)
            shown = mask == (0 if bias is None else bias[:, None, None])
            if not self.rectangular:
                shown |= ~self.occupied.to(mask.device)[:, None, None]
            if not shown.all():
                return None
        return tuple(max(1, count) for count in self.counts)


LayersKept = tuple[Kept, ...]
"""What each cross-attention layer was trimmed to, the leader first; most policies give all layers the same object."""


def extended(before: LayersKept | None, newer: LayersKept) -> LayersKept:
    """Layer by layer, what was kept before followed by what is kept of new images; same objects stay the same."""
    if before is None:
        return newer
    pairs = {(id(old), id(new)): (old, new) for old, new in zip(before, newer, strict=True)}
    made = {pair: old.extended(new) for pair, (old, new) in pairs.items()}
    return tuple(made[id(old), id(new)] for old, new in zip(before, newer, strict=True))
