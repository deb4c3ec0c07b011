"""Weights in four or eight bits: what to ask transformers for, and what a model or a checkpoint holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn

from crosstrim.errors import ConfigError, MissingExtraError
from crosstrim.memory import WEIGHT_BITS
from crosstrim.models import mllama

_LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
_OF_TORCHAO = {"Int8WeightOnlyConfig": "int8", "Float8WeightOnlyConfig": "fp8"}


def left_whole(config: Any) -> tuple[str, ...]:
    """Modules that stay as they are: the head, and what decides which features are kept.

    That is the vision tower, the projection behind it, and q, k and v of the first cross-attention layer: on mini,
    most of the change in what is kept comes from them (docs/scaling.md). Norms, gates, embeddings and biases are no
    matrices of linear layers, and stay as well.

    Args:
        config: an `MllamaConfig`.
    """
    leader = f"model.language_model.layers.{min(config.text_config.cross_attention_layers)}.cross_attn"
    return (
        "lm_head",
        "model.vision_model",
        "model.multi_modal_projector",
        *(f"{leader}.{name}_proj" for name in "qkv"),
    )


def matrix_parameters(config: Any) -> int:
    """How many of a model's parameters `request` makes smaller; no weight is made.

    Args:
        config: an `MllamaConfig`.
    """
    left = tuple(f"{name}." for name in left_whole(config))
    modules = mllama.empty(config).named_modules()
    return sum(
        one.weight.numel() for name, one in modules if isinstance(one, nn.Linear) and not f"{name}.".startswith(left)
    )


def request(name: str, config: Any, dtype: torch.dtype, whole: Sequence[str] | None = None) -> Any:
    """What to pass to `from_pretrained` as `quantization_config`.

    Only the matrices of linear layers become smaller: each is made whole again where it is used, and what it computes
    is of the dtype that it would be without.

    Args:
        name: of the format: "nf4" (bitsandbytes: blocks of 64, their scales in eight bits), "int8" or "fp8" (torchao:
            one scale a row).
        config: an `MllamaConfig`.
        dtype: that the model computes in.
        whole: modules to leave as they are; None: `left_whole(config)`.
    """
    names = list(left_whole(config) if whole is None else whole)
    if name == "nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=names,
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kind = Int8WeightOnlyConfig(version=2) if name == "int8" else Float8WeightOnlyConfig()
    return TorchAoConfig(kind, modules_to_not_convert=names)


def name_of(config: Any) -> str | None:
    """How weights are quantised: "nf4", "int8" or "fp8", another format in its library's words, or None: not at all.

    Args:
        config: an `MllamaConfig`, of a loaded model or of a checkpoint.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    facts = found if isinstance(found, Mapping) else found.to_dict()
    method = facts.get("quant_method")
    method = str(getattr(method, "value", method))
    if facts.get("load_in_4bit"):
        return str(facts["bnb_4bit_quant_type"])
    if method == "torchao":
        kind = str(facts["quant_type"]["default"]["_type"])
        return _OF_TORCHAO.get(kind, f"torchao {kind}")
    return f"{method} int8" if facts.get("load_in_8bit") else method


def check_wanted(name: str | None, config: Any) -> None:
    """Refuse a format before anything is downloaded.

    Args:
        name: of the format; None: none is asked for.
        config: transformers' own configuration, in its place.

    Raises:
        ConfigError: there is no such format, or both are given.
        MissingExtraError: the library that makes it is not installed.
    """
    if name is None:
        return
    if name not in WEIGHT_BITS:
        raise ConfigError(f"quantization={name!r} must be one of {', '.join(WEIGHT_BITS)}.")
    if config is not None:
        raise ConfigError(f"quantization={name!r} and quantization_config say the same thing; give one of them.")
    _check_installed(_LIBRARIES[name], f"quantization={name!r}")


def check_stored(config: Any, model: str, wanted: str | None) -> None:
    """Refuse a checkpoint that was saved quantised where it cannot be read, or is to be quantised again.

    Args:
        config: an `MllamaConfig`, as stored.
        model: what to call it.
        wanted: the format that was asked for.

    Raises:
        ConfigError: it is quantised and a format is asked for.
        MissingExtraError: the library that quantised it is not installed.
    """
    stored = name_of(config)
    if stored is None:
        return
    if wanted is not None:
        raise ConfigError(f"{model} was saved quantised ({stored}); leave quantization={wanted!r} out.")
    library = str(config.quantization_config.get("quant_method"))
    if library in _LIBRARIES.values():
        _check_installed(library, f"{model}, which was saved quantised ({stored}),")


def check_placed(places: Any) -> None:
    """Refuse to leave some quantised weights on the CPU or on disk, from where a GPU would fetch them.

    Args:
        places: a device map, as asked for or as it came out; anything else does not say where anything is.

    Raises:
        ConfigError: it divides a model between GPUs and the CPU, or has parts of it on disk.
    """
    if not isinstance(places, Mapping):
        return
    used = {_kind_of(place) for place in places.values()}
    if "disk" in used or ("cpu" in used and len(used) > 1):
        raise ConfigError(
            f"quantised weights would be on {' and '.join(sorted(used))}; they must all be on GPUs, or all on the "
            "CPU: take larger GPUs, more of them, or a smaller format."
        )


def parts(weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What a weight is made of, each with what it adds to the weight's name: a plain one of nothing but itself.

    Args:
        weight: of a loaded model.
    """
    if type(weight).__module__.startswith("torchao."):
        names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in names:
            part = getattr(weight, name)
            yield f".{name} {part.dtype}", part
        return
    yield "", weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        yield ".absmax", state.absmax


def versions() -> dict[str, str]:
    """Of the libraries that quantise, as far as they are installed."""
    there = [name for name in sorted(set(_LIBRARIES.values())) if importlib.util.find_spec(name) is not None]
    return {name: metadata.version(name) for name in there}


def _kind_of(place: Any) -> str:
    if isinstance(place, int):
        return "cuda"
    return place if place == "disk" else torch.device(place).type


def _check_installed(library: str, asked: str) -> None:
    for needed in (library, "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise MissingExtraError(
                f"{asked} needs {needed}, which is not installed: pip install 'crosstrim[quant]'."
            )
