"""What a trim or a forward pass is refused for, before anything of it is kept."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from crosstrim.calibrated import CalibratedConfig
from crosstrim.config import TrimConfig
from crosstrim.errors import InputError
from crosstrim.models import compat, fingerprint, mllama, names, quantised
from crosstrim.trimming.kept import LayersKept


def check_calibrated(model: nn.Module, config: TrimConfig) -> None:
    """Refuse a config of a calibration that was made with another model, dtype, quantization, repairs or options.

    Raises:
        CalibrationError: it names what differs.
    """
    if isinstance(config, CalibratedConfig):
        repairs = {finding.name: finding.repaired for finding in compat.check(model)}
        inner = cast(Any, mllama.locate(model).model)
        dtype, quantization = str(inner.dtype).removeprefix("torch."), quantised.name_of(inner.config)
        config.check(dtype, quantization, repairs, partial(fingerprint.of_weights_again, model))


def check_rows(mask: torch.Tensor, rows: int, past: int) -> None:
    """Refuse a mask that is too short for the tokens, which transformers would fail on, or worse, broadcast.

    Args:
        mask: cross_attention_mask as the processor makes it, [B, rows, images, tiles].
        rows: T of this pass.
        past: tokens in the cache before it.

    Raises:
        InputError: the mask is for neither T rows nor all rows so far.
    """
    if mask.shape[1] != rows and mask.shape[1] < past + rows:
        advice = "give the mask of these rows or of all rows so far, as the processor makes it"
        if past:
            advice += (
                " and generate() lengthens it; assisted and prompt-lookup decoding of transformers "
                f"{names.transformers_version()} may not lengthen it, trimmed or not: decode plainly there"
            )
        raise InputError(
            f"cross_attention_mask covers {mask.shape[1]} text rows, but this pass brings {rows} and reaches row "
            f"{past + rows}; {advice}."
        )


def check_samples(kept: LayersKept | None, batch: int) -> None:
    """Refuse another number of samples than the cache holds.

    Args:
        kept: what the cache was trimmed to.
        batch: B of this pass.

    Raises:
        InputError: B is not that of the cache.
    """
    if kept is not None and kept[0].kept.shape[0] != batch:
        raise InputError(
            f"the cache holds {kept[0].kept.shape[0]} samples and the input {batch}; repeat or select both alike."
        )


def check_images(mask: torch.Tensor | None, old: int, new: int) -> None:
    """Refuse a mask for other images than those in the cache and in this pass.

    Args:
        mask: cross_attention_mask, [B, rows, images, tiles] or None.
        old: images in the cache.
        new: images that this pass brings.

    Raises:
        InputError: the mask's images are not what both hold together.
    """
    if mask is not None and mask.shape[2] != old + new:
        raise InputError(
            f"cross_attention_mask is for {mask.shape[2]} images, but the cache holds {old} and this pass brings "
            f"{new}. To go on with a conversation, pass the mask of all of its images, and pixel_values of those "
            "alone that are not in the cache yet (None when there are none)."
        )
