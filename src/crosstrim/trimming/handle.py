"""`trim` and the handle it returns, whose hooks say what a forward pass is, and hand it down to where layers attend.

`is_dynamo_compiling` says whether this very code is being traced; `is_compiling` also knows of other threads' work.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, Unpack

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from crosstrim.config import TrimConfig, TrimOptions, resolve
from crosstrim.errors import (
    AlreadyTrimmedError,
    CompatWarning,
    CrosstrimError,
    CrosstrimWarning,
    InputError,
    NotTrimmedError,
    UnsupportedCacheError,
)
from crosstrim.method.choose import Processes
from crosstrim.models import compat, interface, mllama, names, parallel, probe
from crosstrim.models.interface import KEYWORD
from crosstrim.trimming import checks
from crosstrim.trimming.cache import ImageCache, reads
from crosstrim.trimming.kept import LayersKept
from crosstrim.trimming.passes import ImagePass, TextPass, Trim
from crosstrim.trimming.report import TrimReport, image_reports, versions

_GUESSES = "crosstrim_guesses"
"""The keyword under which the head tells the model below it how many of the last rows continue the prompt."""


class TrimHandle:
    """A trim that is on a model: `remove()` it, switch it off for a while, ask what it kept.

    Made by `crosstrim.trim`; leaving its `with` block removes it.

    Attributes:
        config: the options in force.
    """

    def __init__(self, model: nn.Module, config: TrimConfig) -> None:
        probe.check_interface()
        self.config = config
        self._model = mllama.locate(model)
        self._trim = Trim(config, self._model, parallel.ranks(self._model) or Processes())
        self._cache_names = names.cache_names()  # which compiled code cannot ask for
        self._disabled: ContextVar[bool] = ContextVar("crosstrim_disabled", default=False)
        self._blocks = 0
        # Of the latest pass with a trimmed cache, or without one: what it kept, and its bytes, trimmed and untrimmed.
        self._latest: tuple[LayersKept | None, int, int] | None = None
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

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The untrimmed model inside the `with` block, for the calling thread (context) only.

        A cache that was filled while trimming was on cannot be continued inside the block.
        """
        self._refuse_removed()
        token = self._disabled.set(True)
        try:
            yield
        finally:
            self._disabled.reset(token)

    def report(self, cache: Any = None, *, held: bool = False) -> TrimReport:
        """What was kept in the latest trimmed generation, or in the one that `cache` (past_key_values) belongs to.
        With `held` it also tells what share of each image's attention in the first layer the kept features draw.

        Raises:
            CrosstrimError: nothing was generated yet, or `cache` holds nothing that this trim kept.
        """
        outcome = self._latest if cache is None else self._trim.cache(cache).outcome
        if outcome is None:
            what = "nothing was generated yet" if cache is None else "this cache holds no trimmed image features"
            raise CrosstrimError(f"{what}; run the trimmed model on an image first.")
        kept, kv_bytes, kv_bytes_untrimmed = outcome
        return TrimReport(
            samples=() if kept is None else image_reports(kept, self._model.geometry.features_per_image, held),
            kv_bytes=kv_bytes,
            kv_bytes_untrimmed=kv_bytes_untrimmed,
            config=self.config,
            versions=versions(str(mllama.device_of(self._model.leader))),
            compat={finding.name: finding.repaired for finding in compat.check(self._model.model)},
        )

    def __repr__(self) -> str:
        return f"<TrimHandle {'on' if self._hooks else 'removed'}: {self.config}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied with the model: the hooks of a copy would still look at the original's layers."""
        raise CrosstrimError("a trimmed model cannot be copied or pickled; remove() the trim first.")

    def __enter__(self) -> TrimHandle:
        self._refuse_removed()
        self._blocks += 1
        return self

    def __exit__(self, *raised: object) -> None:
        self._blocks -= 1
        if self._blocks == 0:
            self.remove()

    def _refuse_removed(self) -> None:
        if not self._hooks:
            raise CrosstrimError("this trim was removed; call crosstrim.trim again for a new one.")

    # The hooks, in the order in which a forward pass meets them.

    def _expect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the head: learn how many rows at the end are guesses that continue the prompt.

        Assisted decoding puts its first guesses into the same pass as the prompt and asks for one set of logits more
        than it guessed. Whoever else asks for several logits hardly brings a cache and positions as `generate` does.
        """
        wanted = kwargs.get("logits_to_keep", 0)
        if torch.compiler.is_dynamo_compiling() or not isinstance(wanted, int) or wanted < 2 or self.config.lossless:
            return None
        if names.cache_in(kwargs, self._cache_names) is None or kwargs.get("position_ids") is None:
            return None
        return args, kwargs | {_GUESSES: wanted - 1}

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the whole model: say what this pass is."""
        guesses = kwargs.pop(_GUESSES, 0)
        images = kwargs.get("pixel_values")
        images = kwargs.get("cross_attention_states") if images is None else images
        cache = names.cache_in(kwargs, self._cache_names)
        if not torch.compiler.is_dynamo_compiling():
            step = self._pass(args, kwargs, images, cache, guesses)
        elif images is None:
            step = TextPass(self._trim, reads(cache, self._model.layer_indices))
        else:
            raise InputError(
                "a prompt with images was compiled, but which features to keep depends on values; compile "
                'decoding steps alone, as generate(cache_implementation="static", compile_config=...) does.'
            )
        return args, kwargs if step is None else kwargs | {KEYWORD: step}

    def _pass(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], images: Any, kv_cache: Any, guesses: int
    ) -> TextPass | ImagePass | None:
        """What this pass is; None for one that touches no trimmed feature."""
        cache = None if kv_cache is None else self._trim.cache(kv_cache)
        before = None if cache is None else cache.kept
        if self._disabled.get():
            if before is not None:
                raise UnsupportedCacheError(
                    "this cache was filled by the trimmed model, and disabled() cannot bring back what was dropped; "
                    "start a new generation inside disabled()."
                )
            return None
        if images is not None and cache is not None:
            cache.check()
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None  # the model itself refuses this
        batch, rows = tokens.shape[:2]
        past = 0 if kv_cache is None else int(kv_cache.get_seq_length())
        mask = kwargs.get("cross_attention_mask")
        if mask is not None:
            checks.check_rows(mask, rows, past)
        if before is None and not self._starts(cache, images, mask):
            return None
        held, features = (batch, 0) if before is None else before[0].kept.shape
        old = features // self._model.geometry.features_per_image
        checks.check_continues(held, batch, mask, old, 0 if images is None else self._count(images, batch))
        trims_leader = self.config.trim_first_layer
        if cache is not None and before is not None:
            cache.hand_over()
            kept = reads(kv_cache, self._model.layer_indices)
            if images is None:
                return TextPass(self._trim, kept)
            trims_leader = kept[0] is not None
        return ImagePass(
            self._trim,
            tokens=tokens,
            attention_mask=kwargs.get("attention_mask"),
            sees=None if mask is None else mllama.tiles_seen(mask, past, rows),
            images=images,
            before=before,
            past=None if cache is None else past,
            trims_leader=trims_leader,
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
            self._latest = None, 0, 0  # text only
        return images is not None

    def _before_layer(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a cross-attention layer: the leader learns of the cache, followers get the kept features alone."""
        step = kwargs.get(KEYWORD)
        if step is None or step.images is None:
            return None
        if place == 0:
            step.enter_leader(names.cache_in(kwargs, self._cache_names))
            return None
        features = step.features(place, kwargs["cross_attention_states"])
        return args, kwargs | {"cross_attention_states": features}

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
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
        self._latest = (step.chosen.after, 0, 0) if step.cache is None else step.cache.outcome

    def _count(self, images: torch.Tensor, batch: int) -> int:
        """New images per sample: [B, images, tiles, ...] pixels, or features of any shape that end in the width."""
        if images.dim() == 6:
            return images.shape[1]
        return images[..., 0].numel() // (batch * self._model.geometry.features_per_image)


def handle_on(model: nn.Module) -> TrimHandle | None:
    """The trim that is on this module, which `mllama.locate` found as the model."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, TrimHandle)), None)


def trim(model: nn.Module, config: TrimConfig | None = None, **options: Unpack[TrimOptions]) -> TrimHandle:
    """Keep only the image features that the question needs, from the next generation on.

    Works on any loaded `MllamaForConditionalGeneration`, or a module that holds one. Nothing of the model is
    replaced: the trim is a set of torch hooks, and `generate` stays stock.

    Args:
        model: the model to trim, in place.
        config: the options as a `TrimConfig`.
        **options: the fields of `TrimConfig` instead: `k=0.25`, `keep=0.5`, `keep=2048`, ... No k and no keep is
            the lossless tier.

    Returns:
        A handle: a context manager with `remove()`, `disabled()` and `report()`.

    Raises:
        ConfigError: an option is out of range or unknown, or both `config` and options are given.
        UnsupportedModelError: the model has no cross-attention layers that crosstrim knows.
        AlreadyTrimmedError: the model is trimmed already.
        CalibrationError: `config` is of a calibration that was made with another model, dtype or repairs.

    Warns:
        CompatWarning: the installed transformers departs from Meta's reference and the model was not repaired.
    """
    config = resolve(config, options, "trim(model")
    if (handle := handle_on(mllama.locate(model).model)) is not None:
        raise AlreadyTrimmedError(
            f"this {type(model).__name__} is trimmed already; call remove() on the handle that trim() returned, or "
            "on this error's `handle`, before trimming again.",
            handle,
        )
    checks.check_calibrated(model, config)
    unrepaired = [finding.name for finding in compat.check(model) if finding.open]
    if unrepaired:
        warnings.warn(
            f"the installed transformers departs from Meta's Llama-3.2-Vision in {', '.join(unrepaired)} and this "
            "model was not repaired; call crosstrim.compat.apply(model) after loading, or load with crosstrim.load.",
            CompatWarning,
            stacklevel=2,
        )
    return TrimHandle(model, config)
