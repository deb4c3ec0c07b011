"""`trim` and the handle it returns: put a trim on a model, ask what it kept, take it off."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Unpack

from torch import nn

from crosstrim.config import TrimConfig, TrimOptions, resolve
from crosstrim.errors import AlreadyTrimmedError, CompatWarning, CrosstrimError
from crosstrim.models import compat, mllama
from crosstrim.trimming.cache import ImageCache
from crosstrim.trimming.checks import check_calibrated
from crosstrim.trimming.hooks import TrimHooks
from crosstrim.trimming.report import TrimReport, image_reports, versions


class TrimHandle(TrimHooks):
    """A trim that is on a model: `remove()` it, switch it off for a while, ask what it kept.

    Made by `crosstrim.trim`; leaving its `with` block removes it.

    Attributes:
        config: the options in force.
    """

    _blocks = 0

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

    def report(self, cache: Any = None) -> TrimReport:
        """What was kept in the latest trimmed generation, or in the one that `cache` (past_key_values) belongs to.

        Raises:
            CrosstrimError: nothing was generated yet, or `cache` holds nothing that this trim kept.
        """
        outcome = self._latest if cache is None else self._outcome(ImageCache(cache, self._model.layer_indices))
        if outcome is None:
            what = "nothing was generated yet" if cache is None else "this cache holds no trimmed image features"
            raise CrosstrimError(f"{what}; run the trimmed model on an image first.")
        device = str(mllama.device_of(self._model.leader))
        return TrimReport(
            samples=() if outcome.kept is None else image_reports(outcome.kept),
            kv_bytes=outcome.kv_bytes,
            kv_bytes_untrimmed=outcome.kv_bytes_untrimmed,
            config=self.config,
            versions=versions(device),
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
    check_calibrated(model, config)
    unrepaired = [finding.name for finding in compat.check(model) if finding.open]
    if unrepaired:
        warnings.warn(
            f"the installed transformers departs from Meta's Llama-3.2-Vision in {', '.join(unrepaired)} and this "
            "model was not repaired; call crosstrim.compat.apply(model) after loading, or load with crosstrim.load.",
            CompatWarning,
            stacklevel=2,
        )
    return TrimHandle(model, config)
