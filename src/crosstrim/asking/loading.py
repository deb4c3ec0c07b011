"""Load a model and its processor: the embedded mini, a folder, or a repository of the Hugging Face Hub.

Weights come from safetensors alone and no code of a repository ever runs. What the model is gets read from its
config.json first, so that a wrong model is refused before its weights are touched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crosstrim import mini
from crosstrim.errors import ConfigError, LoadError, MissingExtraError, UnsupportedModelError
from crosstrim.models import compat, fingerprint, parallel, quantised
from crosstrim.wording import counted

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration, MllamaProcessor

_DTYPES = ("auto", "bfloat16", "float16", "float32")
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
_MODEL_TYPE, _ARCHITECTURE = "mllama", "MllamaForConditionalGeneration"
_SUPPORTED = (
    "crosstrim loads Llama-3.2-Vision (model_type 'mllama'), such as meta-llama/Llama-3.2-11B-Vision-Instruct"
)
# Neither pickles nor Python files are ever downloaded.
_DOWNLOADS = ["*.json", "*.jinja", "*.safetensors", "tokenizer*"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load(
    model: str | os.PathLike[str] = "mini",
    *,
    dtype: str | torch.dtype | None = None,
    device_map: str | int | torch.device | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    quantization_config: Any = None,
    tp: int = 1,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> tuple[MllamaForConditionalGeneration, MllamaProcessor]:
    """Load a cross-attention vision-language model, repaired to Meta's semantics, and its processor.

    Args:
        model: "mini", the model that ships with crosstrim; a folder; or a Hub id, which is downloaded once.
        dtype: "float32", "bfloat16", "float16", "auto" (as stored), or the torch.dtype. None is "auto", but float32
            for the mini, whose bfloat16 is only how it is stored.
        device_map: a device such as "cuda" or "cuda:1", or how to spread the model over devices, such as "auto",
            which needs accelerate. None is the CPU.
        attn_implementation: passed to transformers: "sdpa", "eager" and so on.
        quantization: "nf4" (four bits, by bitsandbytes), or "int8" or "fp8" (eight bits, by torchao): how to hold the
            matrices of linear layers, but for `crosstrim.models.quantised.left_whole`. None: as they are stored,
            which may be quantised.
        quantization_config: passed to transformers, in place of `quantization`.
        tp: over how many processes to divide the model (tensor parallelism), each of which calls `load` alike:
            `torchrun --nproc-per-node 2 script.py` with `tp=2`. Each takes the GPU of its LOCAL_RANK.
        revision: branch, tag or commit of a Hub repository.
        token: Hub token; None takes the one of `hf auth login`.
        local_files_only: whether to look in the local Hub cache alone.

    Returns:
        The model in eval mode, with `crosstrim.compat.apply` done, and the processor, which prepares images with
        Pillow whether or not torchvision is installed.

    Raises:
        LoadError: something is missing, unreachable, damaged, or not in safetensors.
        UnsupportedModelError: it is another architecture.
        ConfigError: `dtype`, `quantization` or `device_map` is unknown, the device is not there, the checkpoint is
            quantised already, quantised weights cannot be placed so, or the model cannot be divided over `tp`
            processes.
        MissingExtraError: `quantization`, or a checkpoint that was saved quantised, needs a library that is not
            installed, or `device_map` or `tp` needs accelerate.
    """
    wanted_dtype = _dtype(dtype, is_mini=model == "mini")
    spread, device = _placement(device_map)
    _check_parallel(tp, device_map)
    quantised.check_wanted(quantization, quantization_config)
    folder = _folder(model, {"revision": revision, "token": token, "local_files_only": local_files_only})
    config = _config(folder)
    quantised.check_stored(config, str(model), quantization)
    if quantization is not None:
        computed = config.dtype if wanted_dtype == "auto" else getattr(torch, wanted_dtype)
        quantization_config = quantised.request(quantization, config, computed or torch.float32)
    is_quantised = quantization_config is not None or quantised.name_of(config) is not None
    if is_quantised:
        if tp > 1:
            raise ConfigError(f"tp={tp} divides weights that are not quantised; leave the quantization out, or tp.")
        quantised.check_placed(spread)
        # Left to transformers, a model for the CPU would go to a GPU.
        spread = spread or {"": device or torch.device("cpu")}
        device = None
    processor = _load_processor(folder, model)
    options = {
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
        "distributed_config": parallel.division(config, tp) if tp > 1 else None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    loaded = _load_weights(folder, model, device, options, dtype=wanted_dtype, device_map=spread)
    if tp > 1:
        parallel.count_own_heads(loaded)
    if is_quantised:
        quantised.check_placed(getattr(loaded, "hf_device_map", None))
        # Now, and remembered: on some CPUs bitsandbytes packs its weights anew when it first computes.
        fingerprint.of_weights_again(loaded)
    compat.apply(loaded)
    return loaded, processor


def _dtype(dtype: str | torch.dtype | None, is_mini: bool) -> str:
    if dtype is None:
        return "float32" if is_mini else "auto"
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"dtype={name!r} cannot be loaded; choose one of {', '.join(_DTYPES)}.")
    return name


def _placement(device_map: Any) -> tuple[Any, torch.device | None]:
    """What to tell `from_pretrained`, and where to move the model afterwards, of which at least one is None."""
    if device_map is None or isinstance(device_map, dict) or device_map in _SPREAD:
        if device_map is not None and importlib.util.find_spec("accelerate") is None:
            raise MissingExtraError(
                f"the device map {device_map!r} needs accelerate, which is not installed: pip install accelerate."
            )
        return device_map, None
    try:
        device = torch.device(f"cuda:{device_map}" if isinstance(device_map, int) else device_map)
    except RuntimeError as error:
        raise ConfigError(
            f"{device_map!r} is no device; give one such as 'cpu' or 'cuda:0', or {', '.join(_SPREAD)}."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = counted(torch.cuda.device_count(), "CUDA device")
        raise ConfigError(f"the device {str(device)!r} is not there: torch sees {there}; choose another, or 'cpu'.")
    if device.type == "cpu":
        return None, None
    # accelerate reads the weights straight onto the device; without it they pass through the CPU's memory.
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    return ({"": device}, None) if has_accelerate else (None, device)


def _check_parallel(tp: int, device_map: Any) -> None:
    if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
        raise ConfigError(f"tp={tp!r} must be a number of processes, 1 or more.")
    if tp == 1:
        return
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError(f"tp={tp} needs accelerate, which is not installed: pip install accelerate.")
    if device_map is not None:
        raise ConfigError(
            f"tp={tp} gives every process a device of its own; leave device_map={device_map!r} out, or tp."
        )


def read_config(model: str | os.PathLike[str] = "mini") -> Any:
    """The configuration of a model, an `MllamaConfig`. No weight is read, and from the Hub none is downloaded.

    Args:
        model: as `load` takes it.

    Raises:
        LoadError: it is missing, unreachable or damaged.
        UnsupportedModelError: it is another architecture.
    """
    return _config(_folder(model, {"revision": None, "token": None, "local_files_only": False}, weights=False))


def _folder(model: str | os.PathLike[str], hub: dict[str, Any], weights: bool = True) -> Path:
    """The folder that holds the model: checked to be a supported one, and to have its weights in safetensors."""
    path = mini.path() if model == "mini" else Path(model).expanduser()
    if model == "mini" and not (path / "config.json").is_file():
        raise LoadError(f"the embedded model is missing from this installation ({path}); reinstall crosstrim.")
    if path.is_file():
        raise LoadError(f"{path} is a file; give the folder that holds config.json and *.safetensors.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            _refuse_adapter(path)
            raise LoadError(f"{path} holds no config.json; give a folder written by save_pretrained.")
        _check_config(path / "config.json", model)
    else:
        path = _download(str(model), hub, weights)
    if weights and not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        found = f"only {pickles[0]}, a pickle, which could run code when opened" if pickles else "no weights"
        raise LoadError(
            f"{model} holds no *.safetensors ({found}); if you trust it, write it anew with save_pretrained."
        )
    return path


def _refuse_adapter(folder: Path) -> None:
    """Say of a LoRA's folder, or of another adapter's, that the model it was made for is loaded first."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    named = isinstance(base, str) and bool(base)
    of = f"of {base}" if named else "whose adapter_config.json names no base model"
    given = repr(base) if named else "the model it was trained on"
    raise LoadError(
        f"{folder} holds an adapter {of}, and no model; load the base by model, processor = crosstrim.load({given}), "
        f"put the adapter on by model = peft.PeftModel.from_pretrained(model, {str(folder)!r}), then trim that by "
        "crosstrim.trim(model)."
    )


def _download(model: str, hub: dict[str, Any], weights: bool) -> Path:
    """The snapshot of a Hub repository: its config comes first and is checked before anything large."""
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    missing = f"{model!r} is neither 'mini' nor a folder here"
    if model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1:
        raise LoadError(f"{missing}; check the path.")
    try:
        with _quiet_hub():
            _check_connection(model, hub)
            config = hf_hub_download(model, "config.json", **hub)
        _check_config(Path(config), model)
        return Path(snapshot_download(model, allow_patterns=_DOWNLOADS, **hub)) if weights else Path(config).parent
    except errors.GatedRepoError as error:
        raise LoadError(
            f"{model} is gated: accept its licence at https://huggingface.co/{model}, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise LoadError(f"{missing}, nor a repository on the Hub; if it is private, run `hf auth login`.") from error
    except errors.RevisionNotFoundError as error:
        raise LoadError(f"{model} has no revision {hub['revision']!r} on the Hub.") from error
    except errors.HFValidationError as error:
        raise LoadError(f"{missing}, and cannot be a Hub id (owner/name).") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise LoadError(
            f"{missing}, and the Hub cannot be asked (no connection, HF_HUB_OFFLINE, or local_files_only): go online "
            "once to download it, or give the folder of a copy."
        ) from error
    except errors.EntryNotFoundError as error:
        raise LoadError(f"{model} on the Hub holds no config.json; it is no transformers model.") from error
    except (errors.HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise LoadError(f"{model} could not be downloaded: {_first_line(error)}") from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """No lines about attempts that failed: what comes of them is told in one."""
    from huggingface_hub import logging as hub

    verbosity = hub.get_verbosity()
    hub.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub.set_verbosity(verbosity)


def _check_connection(model: str, hub: dict[str, Any]) -> None:
    """Where the Hub cannot be reached and nothing is cached, say so at once and not after half a minute of attempts.

    Every other trouble, such as a Hub that is slow or overloaded, is left to the Hub's library, which tries again.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if hub["local_files_only"] or try_to_load_from_cache(model, "config.json", revision=hub["revision"]) is not None:
        return
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json", revision=hub["revision"]), token=hub["token"])
    except Exception as error:  # of httpx or httpx2, whichever the Hub's library is made with
        if type(error).__name__ == "ConnectError":
            raise errors.LocalEntryNotFoundError(str(error)) from error


def _check_config(file: Path, model: str | os.PathLike[str]) -> None:
    """Refuse what is no Mllama, before any weight is read."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{file} is not valid JSON ({error}); download or save the model again.") from error
    config = config if isinstance(config, dict) else {}
    if "auto_map" in config:
        raise LoadError(f"{model} asks to run code of its own (auto_map in config.json), which crosstrim never does.")
    kind, architectures = config.get("model_type"), config.get("architectures") or [_ARCHITECTURE]
    if kind != _MODEL_TYPE or _ARCHITECTURE not in architectures:
        raise UnsupportedModelError(f"{model} is {architectures[0]} with model_type {kind!r}; {_SUPPORTED}.")


def _config(folder: Path) -> Any:
    from transformers import MllamaConfig

    return MllamaConfig.from_pretrained(folder)


def _load_processor(folder: Path, model: str | os.PathLike[str]) -> MllamaProcessor:
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    try:
        processor = MllamaProcessor.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(processor.image_processor, MllamaImageProcessorPil):
            # With torchvision installed transformers would take its processor, whose pixels differ slightly.
            processor.image_processor = MllamaImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # transformers lets whatever its parsers raise through
        raise LoadError(
            f"the processor of {model} could not be loaded ({_first_line(error)}); it needs tokenizer.json and "
            "preprocessor_config.json or processor_config.json beside config.json."
        ) from error
    return processor


def _load_weights(
    folder: Path,
    model: str | os.PathLike[str],
    device: torch.device | None,
    options: dict[str, Any],
    **placing: Any,
) -> MllamaForConditionalGeneration:
    from safetensors import SafetensorError
    from transformers import MllamaForConditionalGeneration

    try:
        loaded, notes = MllamaForConditionalGeneration.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in words
            **options,
            **placing,
        )
        if device is not None:
            loaded = loaded.to(device)
    except torch.OutOfMemoryError as error:
        raise LoadError(
            f"{model} does not fit the device ({_first_line(error)}); spread it over several with 'auto', or take a "
            "smaller dtype."
        ) from error
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"the weights of {model} could not be loaded ({_first_line(error)}); download or save them again."
        ) from error
    except Exception as error:  # whatever transformers, and what it asks, has against this model or these options
        given = " and ".join(f"{name}={_told(value)}" for name, value in options.items())
        remedy = f"try it without {given}" if given else "try another version of transformers"
        raise LoadError(f"{model} could not be loaded ({_first_line(error)}); {remedy}.") from error
    # transformers would go on with random numbers in the place of either.
    if missing := sorted(notes["missing_keys"]):
        raise LoadError(
            f"{model} lacks {len(missing)} of the model's weights, such as {missing[0]}; download or save it again."
        )
    if misshapen := sorted(notes["mismatched_keys"]):
        name, found, expected = misshapen[0]
        raise LoadError(
            f"{model} has a weight {name} of shape {tuple(found)} where its config.json asks for {tuple(expected)}; "
            "download or save it again."
        )
    return loaded.eval()


def _told(option: Any) -> str:
    """An option in a message, by its kind where it would fill a page, as transformers' configs do."""
    told = repr(option)
    return told if len(told) < 100 and "\n" not in told else type(option).__name__


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
