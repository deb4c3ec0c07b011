"""What a result depends on, beside its settings: the questions, the model, and the software."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from crosstrim.data.dataset import Dataset
from crosstrim.models import compat, mllama
from crosstrim.trimming.report import versions

_SAMPLED = 64  # values of each weight that tell one model from another


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
    """Which weights, in which dtype."""
    located = mllama.locate(model)
    return {
        "name": name,
        "sha256_of_samples": _fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "cross_attention_layers": len(located.cross_layers),
        "features_per_image": located.geometry.features_per_image,
    }


def of_software(model: Any = None) -> dict[str, Any]:
    """Versions, the device, and which repairs of transformers were on; without a model nothing ran, on no device."""
    return {
        "versions": versions("none" if model is None else str(model.device)),
        "compat": {finding.name: finding.repaired for finding in compat.check(model)},
    }


def _fingerprint(model: torch.nn.Module) -> str:
    """A hash over some values of every weight, which is quick and still tells two checkpoints apart."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if not weight.is_meta:  # offloaded to disk
            step = max(1, weight.numel() // _SAMPLED)
            digest.update(weight.detach().flatten()[::step].cpu().double().numpy().tobytes())
    return digest.hexdigest()
