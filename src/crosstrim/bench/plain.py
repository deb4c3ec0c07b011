"""Trimming done the plain way, to compare with: kept features padded to the longest sample, and a mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from crosstrim.models import mllama
from crosstrim.models.names import cache_in, cache_names
from crosstrim.trimming.kept import Kept
from crosstrim.trimming.report import TrimReport


@contextlib.contextmanager
def plainly_trimmed(model: nn.Module, report: TrimReport) -> Iterator[None]:
    """Inside the block, the model keeps what a trimmed run of the same prompt kept, without scoring.

    A batch that is a multiple of the report's repeats each of its samples so often.

    Args:
        model: an Mllama that is not trimmed.
        report: of the trimmed run.
    """
    parts = mllama.locate(model)
    device = next(parts.leader.parameters()).device
    features = sum(image.features for image in report.samples[0])
    kept = torch.zeros(len(report.samples), features, dtype=torch.bool, device=device)
    for sample, images in enumerate(report.samples):
        kept[sample, [index for image in images for index in image.kept_indices]] = True
    state = Kept.of(kept, kept)

    @cache
    def state_of(batch: int) -> Kept:
        return state.batch(lambda tensor: tensor.repeat_interleave(batch // len(kept), dim=0))

    def short(mask: torch.Tensor) -> torch.Tensor | None:
        return state_of(len(mask)).trim_mask(mask, mask.shape[2], mask.dtype)

    def before_leader(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs["cross_attention_states"] is None:
            kwargs["cross_attention_mask"] = short(kwargs["cross_attention_mask"])
        return args, kwargs

    def after_leader(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs["cross_attention_states"] is not None:
            layer = cache_in(kwargs, cache_names()).layers[parts.layer_indices[0]]
            heads, size = layer.keys.shape[1], layer.keys.shape[3]
            slots = (
                state_of(len(layer.keys)).slots.to(layer.keys.device)[:, None, :, None].expand(-1, heads, -1, size)
            )
            layer.keys, layer.values = layer.keys.gather(2, slots), layer.values.gather(2, slots)

    def before_follower(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["cross_attention_mask"] = short(kwargs["cross_attention_mask"])
        if kwargs["cross_attention_states"] is not None:
            batch = len(args[0] if args else kwargs["hidden_states"])
            sequence = mllama.as_sequence(kwargs["cross_attention_states"], batch)
            kwargs["cross_attention_states"] = state_of(batch).trim_features(sequence)
        return args, kwargs

    hooks = [
        parts.leader.register_forward_pre_hook(before_leader, with_kwargs=True),
        parts.leader.register_forward_hook(after_leader, with_kwargs=True),
        *(layer.register_forward_pre_hook(before_follower, with_kwargs=True) for layer in parts.followers),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
