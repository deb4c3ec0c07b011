"""What if later layers chose for themselves, or the first one's cache were merged as well?

Neither makes anything smaller or faster here: this only shows what such trims would answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

import crosstrim
from crosstrim import TrimConfig
from crosstrim.method.choose import choose
from crosstrim.method.rating import real_rows
from crosstrim.models import interface, mllama, names

Choosing = Literal["first", "each", "within"]
POLICY = "contribution"


class HiddenPass:
    """A generation in which each cross-attention layer hides from its rows what it dropped in the prompt.

    Args:
        model: where its layers are.
        keep: the budget.
        choosing: "first": the first layer chooses for all; "each": every layer for itself; "within": the later ones
            for themselves, among twice as many that the first layer chose.
        whole: whether later layers show all features to the prompt, as the first layer does.
        prompt: the model's arguments of the pass with the prompt.
    """

    def __init__(
        self, model: mllama.Mllama, keep: float, choosing: Choosing, whole: bool, prompt: dict[str, Any]
    ) -> None:
        self._model, self._keep, self._choosing, self._whole = model, keep, choosing, whole
        batch, rows = prompt["input_ids"].shape
        seen = mllama.tiles_seen(prompt["cross_attention_mask"], 0, rows)
        self._visible = seen.repeat_interleave(model.geometry.features_per_tile, dim=-1)
        self._real = real_rows(prompt["attention_mask"], batch, rows, seen.device, 0)
        self._kept: dict[int, torch.Tensor] = {}

    def attend(self, call: interface.Call) -> interface.Attended:
        """Choose where this is the prompt, and hide what was dropped; the first layer's prompt sees everything."""
        leads = call.layer == self._model.layer_indices[0]
        prompt = call.layer not in self._kept
        if prompt:
            self._kept[call.layer] = self._choice(call, leads)
        if prompt and (leads or self._whole):
            return call.attend(call.mask)
        mask = torch.zeros(()) if call.mask is None else call.mask
        dropped = ~self._kept[call.layer][:, None, None]
        return call.attend(torch.where(dropped, torch.finfo(call.queries.dtype).min, mask))

    def _choice(self, call: interface.Call, leads: bool) -> torch.Tensor:
        first = self._kept.get(self._model.layer_indices[0])
        if first is not None and self._choosing == "first":
            return first
        if first is not None and self._choosing == "within":
            return self._chosen(call, self._visible & self._wider.unsqueeze(1), 0.5)
        if leads and self._choosing == "within":
            self._wider = self._chosen(call, self._visible, 2 * self._keep)
        return self._chosen(call, self._visible, self._keep)

    def _chosen(self, call: interface.Call, visible: torch.Tensor, keep: float) -> torch.Tensor:
        return choose(
            call.queries,
            call.keys,
            call.values,
            visible,
            TrimConfig(policy=POLICY, keep=keep),
            geometry=self._model.geometry,
            real_rows=self._real,
            scale=call.scale,
        ).kept


@contextmanager
def emulated(model: Any, keep: float, choosing: Choosing, whole: bool) -> Iterator[None]:
    """Inside the block every generation with images is a `HiddenPass`."""
    located = mllama.locate(model)
    state: list[HiddenPass] = []

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is not None or kwargs.get("cross_attention_states") is not None:
            state[:] = [HiddenPass(located, keep, choosing, whole, kwargs)]
        return args, kwargs | {interface.KEYWORD: state[0]}

    hook = located.model.register_forward_pre_hook(begin, with_kwargs=True)
    taken = interface.Taken(map(mllama.attention_of, located.cross_layers))
    try:
        yield None
    finally:
        taken.give_back()
        hook.remove()


class MergedLeader:
    """A trimmed pass that merges in the first layer's cache what the later layers merge before they project.

    Args:
        step: the pass as the trim made it.
        cache: the model's.
        layer: index of the first cross-attention layer.
        kept: what its cache was trimmed to by the pass with the prompt; None in that pass.
    """

    def __init__(self, step: Any, cache: Any, layer: int, kept: Any) -> None:
        self._step, self._cache, self._layer, self.kept = step, cache, layer, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def attend(self, call: interface.Call) -> interface.Attended:
        """The prompt reads everything, as ever; what follows reads means, which draw what their groups would."""
        if call.layer == self._layer and self.kept is not None:
            return call.attend(self.kept.trim_mask(call.mask, call.queries.shape[2], call.queries.dtype))
        attended = self._step.attend(call)
        if call.layer == self._layer:
            leader, follower, *_ = self._step.chosen.after
            self.kept = replace(leader, groups=follower.groups)
            if follower.groups is not None:
                layer = self._cache.layers[self._layer]
                layer.keys, layer.values = (self._means(states) for states in (call.keys, call.values))
        return attended

    def _means(self, states: torch.Tensor) -> torch.Tensor:
        """[B, Hkv, N, D] to [B, Hkv, K, D]."""
        flat = states.transpose(1, 2).flatten(2)
        return self.kept.trim_features(flat).unflatten(2, (states.shape[1], -1)).transpose(1, 2)


@contextmanager
def merged_leader(model: Any, keep: float) -> Iterator[None]:
    """Inside the block the model is trimmed, and merges in every layer's cache, the first one's included."""
    located = mllama.locate(model)
    kept: list[Any] = [None]

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step, cache = kwargs[interface.KEYWORD], names.cache_in(kwargs, names.cache_names())
        prompt = step.images is not None
        merging = MergedLeader(step, cache, located.layer_indices[0], None if prompt else kept[0])
        return args, kwargs | {interface.KEYWORD: merging}

    def end(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kept[0] = kwargs[interface.KEYWORD].kept

    with crosstrim.trim(model, policy=POLICY, keep=keep, merge=True):
        hooks = [
            located.model.register_forward_pre_hook(begin, with_kwargs=True),
            located.model.register_forward_hook(end, with_kwargs=True),
        ]
        try:
            yield None
        finally:
            for hook in hooks:
                hook.remove()
