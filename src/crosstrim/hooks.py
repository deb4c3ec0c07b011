"""Trimming as torch hooks: the first cross-attention layer decides, the others follow, one forward pass at a time."""

from __future__ import annotations

import threading
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from crosstrim import compat, compiled
from crosstrim.config import TrimConfig
from crosstrim.decision import Decision
from crosstrim.errors import CrosstrimWarning, UnsupportedCacheError
from crosstrim.forward import ForwardPass, check_images, check_rows, check_samples, visible_features
from crosstrim.models import cache as caches
from crosstrim.models import mllama, names
from crosstrim.models.maskfree import MaskFree
from crosstrim.state import LayerStates, TrimState, Uncached, extended


@dataclass(frozen=True)
class Outcome:
    """What the latest forward pass with a trimmed cache left there, or the latest without one."""

    states: LayerStates | None
    kv_bytes: int
    kv_bytes_untrimmed: int


class TrimHooks:
    """What a trim does in the forward passes of a model, from when it is made until `remove()`.

    Args:
        model: which holds an Mllama without such hooks.
        config: the options.
    """

    def __init__(self, model: nn.Module, config: TrimConfig) -> None:
        self.config = config
        self._model = mllama.locate(model)
        self._lossless = config.lossless
        self._leader_index = self._model.layer_indices[0]
        self._decision = Decision(config, self._model)
        self._uncached = Uncached()
        self._local = threading.local()
        self._disabled: ContextVar[bool] = ContextVar("crosstrim_disabled", default=False)
        self._latest: Outcome | None = None
        self._hooks: list[RemovableHandle] = []
        names.cache_keyword()  # refuses a transformers that calls it otherwise
        self._put_on()

    def _put_on(self) -> None:
        self._watched = mllama.attention_inputs(self._model.leader)
        queries, keys, values = self._watched
        self._hooks = [
            self._model.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            self._model.leader.register_forward_pre_hook(self._before_leader, with_kwargs=True),
            self._model.leader.register_forward_hook(self._after_leader, with_kwargs=True),
            queries.register_forward_hook(partial(self._see, "queries")),
            keys.register_forward_hook(partial(self._see, "keys")),
            values.register_forward_hook(partial(self._see, "values")),
        ]
        if self._model.head is not None:
            self._hooks.append(self._model.head.register_forward_pre_hook(self._expect, with_kwargs=True))
        self._hooks += [
            follower.register_forward_pre_hook(partial(self._before_follower, place), with_kwargs=True)
            for place, follower in enumerate(self._model.followers, start=1)
        ]
        for layer in self._model.cross_layers:
            self._hooks += MaskFree(layer, lambda: self._current).put_on()
        self._hooks += compiled.put_on(self._model)

    def remove(self) -> None:
        """Take the trim off; the model is as it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._local = threading.local()  # an interrupted pass leaves its tensors there

    # The hooks, in the order in which a forward pass meets them.

    @property
    def _current(self) -> ForwardPass | None:
        return None if compiled.compiling() else getattr(self._local, "current", None)

    def _expect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the head: learn how many rows at the end are guesses that continue the prompt.

        Assisted decoding puts its first guesses into the same pass as the prompt and asks for one set of logits
        more than it guessed. Guesses must not rate, and must see what a generated token sees. Whoever else asks for
        several logits hardly brings a cache and positions as `generate` does.
        """
        if compiled.compiling():
            return
        wanted = kwargs.get("logits_to_keep", 0)
        by_generate = names.cache_in(kwargs) is not None and kwargs.get("position_ids") is not None
        guessing = isinstance(wanted, int) and wanted > 1 and by_generate and not self._lossless
        self._local.continuation = wanted - 1 if guessing else 0

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the whole model: recognise the conversation by its cache."""
        if compiled.stands_aside(kwargs):
            return
        self._local.current = None
        continuation, self._local.continuation = getattr(self._local, "continuation", 0), 0
        cache = names.cache_in(kwargs)
        states = caches.states_of(cache, self._model.layer_indices)
        images = kwargs.get("pixel_values")
        images = kwargs.get("cross_attention_states") if images is None else images
        if self._disabled.get():
            if states is not None:
                raise UnsupportedCacheError(
                    "this cache was filled by the trimmed model, and disabled() cannot bring back what was dropped; "
                    "start a new generation inside disabled()."
                )
            return
        if images is not None:
            caches.check(cache, self._model.layer_indices, self.config.kv_dtype)
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return  # the model itself refuses this
        mask = kwargs.get("cross_attention_mask")
        if mask is not None:
            check_rows(mask, tokens, cache)
        if states is None and caches.holds_features(cache, self._leader_index):
            if images is not None:
                raise UnsupportedCacheError(
                    "this cache holds image features that were cached before trim(), and new images cannot join them "
                    "trimmed; start with an empty cache, or continue inside disabled()."
                )
            return
        if states is None and images is None:
            if mask is not None:
                warnings.warn(
                    "a cross_attention_mask came without an image and the cache holds none either: the answer will "
                    "not depend on the image; if that was not meant, pass pixel_values with the prompt and leave "
                    "prefill_chunk_size unset.",
                    CrosstrimWarning,
                    stacklevel=2,
                )
            self._latest = Outcome(None, 0, 0)  # text only
            return
        check_samples(states, tokens)
        past = None if images is None or cache is None else int(cache.get_seq_length())
        whole = not self.config.trim_first_layer if states is None else caches.is_whole(cache, self._leader_index)
        if continuation >= tokens.shape[1] or tokens.shape[0] > 1:
            continuation = 0  # no assisted decoding
        self._local.current = ForwardPass(
            tokens, kwargs.get("attention_mask"), cache, states, images, past, not whole, continuation
        )

    def _before_leader(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The leader attends to all features of new images and to the kept ones of earlier images."""
        step = self._current
        if step is None:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("cross_attention_mask")
        size = self._model.features_per_image
        if step.images is None:
            check_images(mask, step.before, 0, size)
            step.after = step.before
            if step.trims_leader and step.after is not None:
                kwargs["cross_attention_mask"] = step.mask(step.after[0], mask, hidden_states)
            return args, kwargs
        if not self._lossless:
            mllama.check_attention_inputs(module, self._watched)
        step.cache, step.full_mask = names.cache_in(kwargs), mask
        features = mllama.as_sequence(kwargs["cross_attention_states"], hidden_states.shape[0])
        check_images(mask, step.before, features.shape[1], size)
        caches.make_growable(step.cache, self._model.layer_indices)
        whole = TrimState.whole(features, size)
        step.wide = extended(step.before, (whole,) * len(self._model.cross_layers))
        leader_mask = mask
        if step.before is not None and step.trims_leader:
            leader_mask = step.mask(step.wide[0], mask, hidden_states)
        columns = step.wide[0].length if step.trims_leader else step.wide[0].feature_count
        step.visible = visible_features(
            leader_mask, kwargs.get("full_text_row_masked_out_mask"), hidden_states, columns
        )
        if step.cache is None and not torch.is_grad_enabled():  # as `generate` runs, and no training
            step.prompt = self._uncached.find(step.images, *step.rows)
        if step.prompt is not None and step.trims_leader:
            leader_mask = step.prompt.hide_from_generated_rows(leader_mask, hidden_states)
        step.counts = step.wide[0].readable(leader_mask) if columns == step.wide[0].length else None
        kwargs["cross_attention_mask"] = leader_mask
        return args, kwargs

    def _see(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        step = self._current
        if step is not None and step.images is not None and not self._lossless:
            setattr(step, name, output.detach())

    def _after_leader(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor | None:
        """Score and select; gather once what every follower will read."""
        step = self._current
        if step is None or step.images is None:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        features = mllama.as_sequence(kwargs["cross_attention_states"], hidden_states.shape[0])
        step.appended = step.prompt.states if step.prompt else self._decide(step, features.shape[1])
        step.after = extended(step.before, step.appended)
        if step.cache is None and step.prompt is None and not torch.is_grad_enabled():
            self._uncached.remember(step.images, step.after, *step.rows)
        step.forget_scores()  # the followers need the memory
        if step.cache is None or not step.trims_leader:
            return None
        caches.keep_newest(step.cache, self._leader_index, step.appended[0])
        if not step.continuation:
            return None
        return self._continued(step, step.after[0], module, hidden_states, kwargs, output)

    def _continued(
        self,
        step: ForwardPass,
        after: TrimState,
        leader: nn.Module,
        hidden_states: torch.Tensor,
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        """The leader's output, with the rows that continue the prompt computed on the trimmed cache."""
        rows = slice(-step.continuation, None)
        row_mask = kwargs.get("full_text_row_masked_out_mask")
        mask = after.trim_mask(step.full_mask, hidden_states.shape[1], hidden_states.dtype)
        again = kwargs | {
            "hidden_states": hidden_states[:, rows],
            "cross_attention_states": None,
            "cross_attention_mask": None if mask is None else mask[:, :, rows],
            "full_text_row_masked_out_mask": None if row_mask is None else row_mask[:, :, rows],
        }
        self._local.current = None  # this inner call is not a pass of its own
        try:
            redone = leader(**again)
        finally:
            self._local.current = step
        return torch.cat([output[:, : -step.continuation], redone], dim=1)

    def _decide(self, step: ForwardPass, new_count: int) -> LayerStates:
        if self._lossless:
            return self._decision.lossless(step, new_count, blind_rows_leak=self._evicts_afterwards)
        if not hasattr(step, "queries"):  # the leader's attention was compiled, and ran without its hooks
            raise compiled.refusal()
        older = None
        if step.before is not None:
            older = step.cache.layers[self._leader_index].keys[:, :, :-new_count]
        return self._decision.scored(step, new_count, older)

    @property
    def _evicts_afterwards(self) -> bool:
        """Whether followers must see all features at prefill and shrink only afterwards.

        The lossless tier promises the same answers. Where rows before the image attend to everything, padding
        included, and that was not repaired, padding can only go once those rows have been computed.
        """
        return self._lossless and not compat.blind_rows_pass_through(self._model.leader)

    def _before_follower(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Followers read the kept features in place of all of them."""
        step = self._current
        if step is None or step.after is None:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("cross_attention_mask")
        if step.images is not None and self._evicts_afterwards:
            kwargs["cross_attention_mask"] = step.mask(step.wide[place], mask, hidden_states)
            return args, kwargs
        kwargs["cross_attention_mask"] = step.mask(step.after[place], mask, hidden_states)
        if step.images is not None:
            features = mllama.as_sequence(kwargs["cross_attention_states"], hidden_states.shape[0])
            kwargs["cross_attention_states"] = step.read(step.appended[place], features)
        return args, kwargs

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the whole model, also when it raised: shrink what was cached whole, and publish the outcome."""
        if compiled.stands_aside(kwargs):
            return
        # Not `_current`: between graph breaks torch may compile this hook although it let `_begin` run.
        step, self._local.current = getattr(self._local, "current", None), None
        if step is None or step.images is None or output is None:
            return
        if step.after is None:  # the leader was compiled, and ran without its hooks
            raise compiled.refusal()
        if step.cache is None:
            self._latest = Outcome(step.after, 0, 0)
            return
        if self._evicts_afterwards:
            for index, state in zip(self._model.layer_indices[1:], step.appended[1:], strict=True):
                caches.keep_newest(step.cache, index, state)
        caches.adopt(step.cache, self._model.layer_indices, step.after, self.config.kv_dtype, not step.trims_leader)
        trimmed = self._model.layer_indices[0 if step.trims_leader else 1 :]
        caches.fill_up(step.cache, trimmed, self._model.features_per_image)
        self._latest = self._outcome(step.cache)

    def _outcome(self, cache: Any) -> Outcome | None:
        states = caches.states_of(cache, self._model.layer_indices)
        if states is None:
            return None
        held = caches.bytes_of(cache, self._model.layer_indices)
        per_feature = caches.bytes_per_feature(cache, self._model.layer_indices)
        return Outcome(states, held, per_feature * states[0].kept.numel())
