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
    """Refuse a mask [B, T, images, tiles] for neither these rows nor all so far, which might be broadcast."""
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


def check_continues(held: int, batch: int, mask: torch.Tensor | None, old: int, new: int) -> None:
    """Refuse a `batch` for a cache of `held` samples, and a mask [B, T, images, tiles] for others than its images.

    Those are the `old` ones in the cache and the `new` ones that this pass brings.
    """
    if held != batch:
        raise InputError(f"the cache holds {held} samples and the input {batch}; repeat or select both alike.")
    if mask is not None and mask.shape[2] != old + new:
        raise InputError(
            f"cross_attention_mask is for {mask.shape[2]} images, but the cache holds {old} and this pass brings "
            f"{new}. To go on with a conversation, pass the mask of all of its images, and pixel_values of those "
            "alone that are not in the cache yet (None when there are none)."
        )
