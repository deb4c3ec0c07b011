"""Start vLLM's server with trimming, and refuse what trimming was not tested with."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from packaging.version import Version

from crosstrim import mini
from crosstrim.config import TrimConfig
from crosstrim.engines import process
from crosstrim.engines.settings import config_for
from crosstrim.engines.vllm import settings
from crosstrim.errors import CrosstrimWarning, EngineError

TESTED = "0.32"
SCHEDULER = "crosstrim.engines.vllm.scheduler.scheduler"

# What vLLM's configuration must say, and what makes it say it. The first group can be tried at one's own risk.
_TESTED = {
    "use_v2_model_runner": (False, "VLLM_USE_V2_MODEL_RUNNER=0 in the environment"),
    "cache_config.cache_dtype": ("auto", "no --kv-cache-dtype"),
}
_REQUIRED = {
    "model_config.quantization": (None, "the checkpoint as it was before it was quantised, and no --quantization"),
    "speculative_config": (None, "no --speculative-config"),
    "lora_config": (None, "no --enable-lora"),
    "kv_transfer_config": (None, "no --kv-transfer-config"),
    "parallel_config.pipeline_parallel_size": (1, "--pipeline-parallel-size 1"),
    "parallel_config.decode_context_parallel_size": (1, "--decode-context-parallel-size 1"),
    "parallel_config.use_ubatching": (False, "no --enable-dbo"),
}


def is_tested(version: str) -> bool:
    """Whether this version of vLLM is one that the plugin was tested with."""
    return Version(version).release[:2] == Version(TESTED).release


def check_version(version: str) -> None:
    """Refuse to run in a vLLM that the plugin was not tested with.

    Raises:
        EngineError: it was not.
    """
    if not is_tested(version):
        raise EngineError(
            f"crosstrim's Mllama was tested with vLLM {TESTED} and not with {version}; install vllm=={TESTED}.*."
        )


class EngineSettings:
    """What vLLM asks about an architecture before it builds anything; it knows these two names."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the trim, and say that pictures are read through cross-attention.

        Raises:
            ConfigError: an option is unknown or out of range, or cannot be had in vLLM.
        """
        settings.trim_of(model_config.hf_config)
        model_config.hf_config.is_encoder_decoder = True
        model_config.__dict__.pop("is_encoder_decoder", None)  # vLLM has asked before, and remembers
        model_config.multimodal_config.mm_processor_cache_gb = 0  # a picture goes with its question, never alone

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the rest, and take the scheduler that keeps pictures in order.

        Raises:
            EngineError: something has another value than the one that was tested.
        """
        allowed = bool(settings.options_of(vllm_config.model_config.hf_config).get(settings.ALLOW_UNTESTED))
        check_engine(vllm_config, allow_untested=allowed)
        scheduling = vllm_config.scheduler_config
        scheduling.scheduler_cls = SCHEDULER
        # The longest that CUDA graphs must reach to.
        vllm_config.model_config.hf_config.max_source_positions = scheduling.max_num_encoder_input_tokens


def check_engine(vllm_config: Any, *, allow_untested: bool) -> None:
    """Refuse what trimming was not made for or, without `allow_untested`, was not tested with.

    Args:
        vllm_config: vLLM's whole configuration.
        allow_untested: only warn of what was not tested.

    Raises:
        EngineError: something has another value than the one that was tested.
    """
    for name, (required, remedy) in {**_TESTED, **_REQUIRED}.items():
        found: Any = vllm_config
        for part in name.split("."):
            found = getattr(found, part)
        if found == required:
            continue
        problem = f"crosstrim in vLLM was tested with {name}={required!r} only, and this is {found!r}"
        if name in _REQUIRED or not allow_untested:
            own_risk = "" if name in _REQUIRED else f', or try it with {{"crosstrim": {{"{settings.ALLOW_UNTESTED}": true}}}}'
            raise EngineError(f"{problem}; start it with {remedy}{own_risk}.")
        warnings.warn(f"{problem}.", CrosstrimWarning, stacklevel=2)
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        raise EngineError(
            f"crosstrim in vLLM needs a scheduler of its own, and {vllm_config.scheduler_config.scheduler_cls!r} was "
            "given; leave --scheduler-cls out."
        )
    ranks = vllm_config.parallel_config.tensor_parallel_size
    heads = vllm_config.model_config.hf_config.text_config.num_key_value_heads
    if heads % ranks:
        raise EngineError(f"{heads} key/value heads cannot be shared by {ranks} ranks; take a divisor of {heads}.")


def command(
    model: str,
    config: TrimConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tensor_parallel: int = 1,
    options: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts vLLM's OpenAI-compatible server with trimming, and its environment.

    Args:
        model: "mini", a folder, or a Hub id.
        config: what to trim.
        host: to listen on.
        port: to listen on.
        tensor_parallel: ranks to spread the model over.
        options: further options of `vllm serve`, appended as they are.

    Returns:
        The arguments, the interpreter first, and what to add to the environment.

    Raises:
        ConfigError: vLLM cannot have that trimming.
    """
    defaults = {field.name: field.default for field in fields(TrimConfig)}
    values = {name: value for name, value in config.to_dict().items() if value != defaults.get(name)}
    settings.checked(config_for("vLLM", values))
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    arguments += ["--model", str(mini.path()) if model == "mini" else model, "--served-model-name", model]
    arguments += ["--host", host, "--port", str(port), "--tensor-parallel-size", str(tensor_parallel)]
    arguments += ["--hf-overrides", json.dumps({"crosstrim": values})]
    if model == "mini":
        arguments += ["--dtype", "float32"]
    return [*arguments, *options], {"VLLM_USE_V2_MODEL_RUNNER": "0"}


def serve(model: str, config: TrimConfig, **options: Any) -> NoReturn:
    """Print the command and become vLLM's server. Takes what `command` takes, and does not return.

    Raises:
        MissingExtraError: vLLM is not installed.
        ConfigError: vLLM cannot have that trimming.
    """
    process.become("vllm", *command(model, config, **options))
