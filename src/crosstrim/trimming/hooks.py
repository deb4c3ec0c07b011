"""Trimming as torch hooks: they say what a forward pass is, and hand it down to where the layers attend."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from crosstrim.config import TrimConfig
from crosstrim.errors import CrosstrimWarning, InputError, NotTrimmedError, UnsupportedCacheError
from crosstrim.method.choose import Processes
from crosstrim.models import interface, mllama, names, parallel, probe
from crosstrim.models.interface import KEYWORD
from crosstrim.trimming import checks
from crosstrim.trimming.cache import ImageCache, traced_kept
from crosstrim.trimming.kept import LayersKept
from crosstrim.trimming.passes import ImagePass, TextPass, Trim

# `is_dynamo_compiling` says whether this very code is being traced; `is_compiling` also knows of other threads' work.

_GUESSES = "crosstrim_guesses"
"""The keyword under which the head tells the model below it how many of the last rows continue the prompt."""

_Arguments = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What the latest forward pass with a trimmed cache left there, or the latest without one."""

    kept: LayersKept | None
    kv_bytes: int
    kv_bytes_untrimmed: int


class TrimHooks:
    """What a trim does in the forward passes of a model, from when it is made until `remove()`.

    Args:
        model: which holds an Mllama without such hooks.
        config: the options.
    """

    def __init__(self, model: nn.Module, config: TrimConfig) -> None:
        probe.check_interface()
        self.config = config
        self._model = mllama.locate(model)
        self._trim = Trim(config, self._model, parallel.ranks(self._model) or Processes())
        self._cache_names = names.cache_names()
        self._disabled: ContextVar[bool] = ContextVar("crosstrim_disabled", default=False)
        self._latest: Outcome | None = None
        self._hooks: list[RemovableHandle] = [
            self._model.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.model.register_forward_hook(self._end, with_kwargs=True),
        ]
        if self._model.head is not None:
            self._hooks.append(self._model.head.register_forward_pre_hook(self._expect, with_kwargs=True))
        self._hooks += [
            layer.register_forward_pre_hook(partial(self._before_layer, place), with_kwargs=True)
            for place, layer in enumerate(self._model.cross_layers)
        ]
        self._taken = interface.Taken(map(mllama.attention_of, self._model.cross_layers))

    def remove(self) -> None:
        """Take the trim off; the model is as it was. A second call does nothing."""
        self._trim.switch.on = False
        self._taken.give_back()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # The hooks, in the order in which a forward pass meets them.

    def _expect(self, module: nn.Module, args: tuple[Any, ...], kwargs: _Arguments) -> Any:
        """Before the head: learn how many rows at the end are guesses that continue the prompt.

        Assisted decoding puts its first guesses into the same pass as the prompt and asks for one set of logits
        more than it guessed. Guesses must not rate, and must see what a generated token sees. Whoever else asks for
        several logits hardly brings a cache and positions as `generate` does.
        """
        wanted = kwargs.get("logits_to_keep", 0)
        if torch.compiler.is_dynamo_compiling() or not isinstance(wanted, int) or wanted < 2 or self.config.lossless:
            return None
        if names.cache_in(kwargs, self._cache_names) is None or kwargs.get("position_ids") is None:
            return None
        return args, kwargs | {_GUESSES: wanted - 1}

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: _Arguments) -> Any:
        """Before the whole model: say what this pass is."""
        guesses = kwargs.pop(_GUESSES, 0)
        images = kwargs.get("pixel_values")
        images = kwargs.get("cross_attention_states") if images is None else images
        if torch.compiler.is_dynamo_compiling():
            if images is not None:
                raise InputError(
                    "a prompt with images was compiled, but which features to keep depends on values; compile "
                    'decoding steps alone, as generate(cache_implementation="static", compile_config=...) does.'
                )
            kwargs[KEYWORD] = TextPass(
                self._trim, traced_kept(names.cache_in(kwargs, self._cache_names), self._model.layer_indices)
            )
            return args, kwargs
        step = self._pass(args, kwargs, images, guesses)
        if step is not None:
            kwargs[KEYWORD] = step
        return args, kwargs

    def _pass(
        self, args: tuple[Any, ...], kwargs: _Arguments, images: Any, guesses: int
    ) -> TextPass | ImagePass | None:
        """What this pass is; None for one that touches no trimmed feature."""
        cache = names.cache_in(kwargs, self._cache_names)
        cache = None if cache is None else ImageCache(cache, self._model.layer_indices)
        before = None if cache is None else cache.kept
        if self._disabled.get():
            if before is not None:
                raise UnsupportedCacheError(
                    "this cache was filled by the trimmed model, and disabled() cannot bring back what was dropped; "
                    "start a new generation inside disabled()."
                )
            return None
        if images is not None and cache is not None:
            cache.check(self.config.kv_dtype)
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None  # the model itself refuses this
        batch, rows = tokens.shape[:2]
        past = 0 if cache is None else cache.tokens
        mask = kwargs.get("cross_attention_mask")
        if mask is not None:
            checks.check_rows(mask, rows, past)
        if before is None and not self._starts(cache, images, mask):
            return None
        checks.check_samples(before, batch)
        size = self._model.geometry.features_per_image
        old = 0 if before is None else before[0].feature_count // size
        checks.check_images(mask, old, 0 if images is None else self._count(images, batch))
        whole = not self.config.trim_first_layer
        if before is not None and cache is not None:
            cache.read_under(self._trim.switch)
            whole = cache.leader_is_whole
            if images is None:
                return TextPass(self._trim, (None if whole else before[0], *before[1:]))
        return ImagePass(
            self._trim,
            tokens=tokens,
            attention_mask=kwargs.get("attention_mask"),
            sees=None if mask is None else mllama.tiles_seen(mask, past, rows),
            images=images,
            before=before,
            past=None if cache is None else past,
            trims_leader=not whole,
            # Assisted decoding knows one sample.
            prompt_rows=rows - guesses if batch == 1 and guesses < rows else rows,
        )

    def _starts(self, cache: ImageCache | None, images: Any, mask: Any) -> bool:
        """Whether a pass whose cache holds nothing trimmed begins to trim."""
        if cache is not None and cache.holds_features:
            if images is not None:
                raise UnsupportedCacheError(
                    "this cache holds image features that were cached before trim(), and new images cannot join them "
                    "trimmed; start with an empty cache, or continue inside disabled()."
                )
            return False
        if images is None:
            if mask is not None:
                warnings.warn(
                    "a cross_attention_mask came without an image and the cache holds none either: the answer will "
                    "not depend on the image; if that was not meant, pass pixel_values with the prompt and leave "
                    "prefill_chunk_size unset.",
                    CrosstrimWarning,
                    stacklevel=2,
                )
            self._latest = Outcome(None, 0, 0)  # text only
        return images is not None

    def _before_layer(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: _Arguments) -> Any:
        """Before a cross-attention layer: the leader learns of the cache, followers get the kept features alone."""
        step = kwargs.get(KEYWORD)
        if step is None or step.images is None:
            return None
        if place == 0:
            step.enter_leader(names.cache_in(kwargs, self._cache_names))
            return None
        features = step.features(place, kwargs["cross_attention_states"])
        return args, kwargs | {"cross_attention_states": features}

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: _Arguments, output: Any) -> None:
        """After the whole model: see that it was trimmed, and publish the outcome."""
        step = kwargs.get(KEYWORD)
        if step is None or step.images is None:
            return
        if step.chosen is None:
            raise NotTrimmedError(
                "the pass brought an image, but the first cross-attention layer attended to it without crosstrim; "
                "was its cross_attn or its config replaced after trim(), or the prompt compiled? remove() the trim "
                "and call crosstrim.trim again, and compile decoding steps alone."
            )
        self._latest = Outcome(step.chosen.after, 0, 0) if step.cache is None else self._outcome(step.cache)

    def _outcome(self, cache: ImageCache) -> Outcome | None:
        kept = cache.kept
        if kept is None:
            return None
        return Outcome(kept, cache.bytes, cache.bytes_per_feature * kept[0].kept.numel())

    def _count(self, images: torch.Tensor, batch: int) -> int:
        """New images per sample: [B, images, tiles, ...] pixels, or features of any shape that end in the width."""
        if images.dim() == 6:
            return images.shape[1]
        return images[..., 0].numel() // (batch * self._model.geometry.features_per_image)
