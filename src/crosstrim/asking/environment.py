"""What crosstrim runs on here: versions, devices, extras, and where transformers departs from the reference."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from crosstrim.errors import IncompatibleTransformersError
from crosstrim.models import compat, mllama, probe, quantised
from crosstrim.trimming.report import versions


def best_device() -> str:
    """The first CUDA device where there is one, and otherwise the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(model: Any = None) -> dict[str, Any]:
    """The environment as plain JSON types.

    Args:
        model: a loaded model to describe and check as well. Whether a repair is on can be said of a model alone.
    """
    findings = [finding.to_dict() | {"open": finding.open} for finding in compat.check(model)]
    if model is None:
        findings = [{name: one[name] for name in ("name", "departs", "summary", "reference")} for one in findings]
    result: dict[str, Any] = {
        "versions": versions(best_device()),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "extras": extras(),
        "trimming": trimming(),
        "compat": findings,
    }
    if model is not None:
        result["model"] = _describe_model(model)
    return result


def trimming() -> dict[str, Any]:
    """Whether the installed transformers can be trimmed, tried out on a tiny model, and what is in the way if not."""
    try:
        probe.check_interface()
    except IncompatibleTransformersError as error:
        return {"works": False, "problem": str(error)}
    return {"works": True, "problem": None}


def extras() -> dict[str, bool]:
    """Per extra of the package, whether everything it asks for is installed."""
    from packaging.requirements import Requirement

    package = metadata.metadata("crosstrim")
    names = package.get_all("Provides-Extra") or []
    requirements = [Requirement(line) for line in metadata.requires("crosstrim") or []]
    return {
        name: all(
            _is_installed(requirement)
            for requirement in requirements
            if requirement.marker is not None and requirement.marker.evaluate({"extra": name})
        )
        for name in sorted(names)
    }


def _is_installed(requirement: Any) -> bool:
    try:
        return bool(requirement.specifier.contains(metadata.version(requirement.name), prereleases=True))
    except metadata.PackageNotFoundError:
        return False


def _describe_model(model: Any) -> dict[str, Any]:
    located = mllama.locate(model)
    parameter = next(model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": model.num_parameters(),  # it knows how many a byte may hold
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "quantization": quantised.name_of(model.config),
        "device": str(parameter.device),
        "cross_attention_layers": list(located.layer_indices),
        "features_per_image": located.geometry.features_per_image,
    }
