"""What a result depends on, beside its settings: the questions, the model, and the software."""

from __future__ import annotations

from typing import Any

from crosstrim.data.dataset import Dataset
from crosstrim.models import compat, fingerprint, mllama, quantised
from crosstrim.trimming.report import versions


def of_dataset(dataset: Dataset) -> dict[str, Any]:
    """Which questions, and which rows could not be asked."""
    return {
        "name": dataset.name,
        "sha256": dataset.sha256,
        "questions": len(dataset.items),
        "questions_per_kind": dataset.kinds,
        "left_out": dataset.complaints(),
    }


def of_model(model: Any, name: str) -> dict[str, Any]:
    """Which weights, in which dtype, and how they are quantised, if they are."""
    located, quantization = mllama.locate(model), quantised.name_of(model.config)
    return {
        "name": name,
        "sha256_of_samples": fingerprint.of_weights_again(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "cross_attention_layers": len(located.cross_layers),
        "features_per_image": located.geometry.features_per_image,
    } | ({} if quantization is None else {"quantization": quantization})


def of_software(model: Any = None) -> dict[str, Any]:
    """Versions, the device, and which repairs of transformers were on; without a model nothing ran, on no device."""
    return {
        "versions": versions("none" if model is None else str(model.device)),
        "compat": {finding.name: finding.repaired for finding in compat.check(model)},
    }
