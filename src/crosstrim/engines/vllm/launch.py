"""What vLLM has to be told for a trimmed Mllama, what is refused, and the command that starts its server."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from packaging.version import Version

from crosstrim import mini
from crosstrim.config import TrimConfig
from crosstrim.engines import process
from crosstrim.engines.prompt import PromptTrim
from crosstrim.engines.settings import check_values, config_for, given, read_options
from crosstrim.errors import CrosstrimWarning, EngineError

TESTED = "0.32"
SCHEDULER = "crosstrim.engines.vllm.scheduler.scheduler"
_ALLOW = "allow_untested"

# What vLLM's configuration must say, and what makes it say it.
_REQUIRED = {
    "model_config.quantization": (None, "the checkpoint as it was before it was quantised, and no --quantization"),
    "speculative_config": (None, "no --speculative-config"),
    "lora_config": (None, "no --enable-lora"),
    "kv_transfer_config": (None, "no --kv-transfer-config"),
    "parallel_config.pipeline_parallel_size": (1, "--pipeline-parallel-size 1"),
    "parallel_config.decode_context_parallel_size": (1, "--decode-context-parallel-size 1"),
    "parallel_config.use_ubatching": (False, "no --enable-dbo"),
}
# The same, of what should work as well and could not be tried.
_TRIED = {
    "use_v2_model_runner": (False, "VLLM_USE_V2_MODEL_RUNNER=0 in the environment"),
    "cache_config.cache_dtype": ("auto", "no --kv-cache-dtype"),
}


def is_tested(version: str) -> bool:
    """Whether the plugin was tested with this version of vLLM."""
    return Version(version).release[:2] == Version(TESTED).release


def check_version(version: str) -> None:
    """Refuse to run in a vLLM that the plugin was not tested with.

    Raises:
        EngineError: it was not.
    """
    if not is_tested(version):
        raise EngineError(
            f"crosstrim was tested with vLLM {TESTED}, and this is {version}; install vllm~={TESTED}.0."
        )


def trim_of(model: Any) -> PromptTrim:
    """The trim of requests that do not bring their own: "crosstrim" in the model's config, or the environment.

    Args:
        model: an `MllamaConfig`.

    Raises:
        ConfigError: an option is unknown, out of range, given twice, or cannot be had in vLLM.
    """
    options = _options(model)
    options.pop(_ALLOW, None)
    return PromptTrim.of(config_for("vLLM", options, count_beforehand=True), model)


def images_planned(multimodal_config: Any) -> int:
    """Images of one request that memory is planned for: what --limit-mm-per-prompt says, or one."""
    given_by_user = "image" in multimodal_config.limit_per_prompt
    return int(multimodal_config.get_limit_per_prompt("image")) if given_by_user else 1


class EngineSettings:
    """What vLLM asks about an architecture before it builds anything, under these two names."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the trim, and say that images are read by cross-attention.

        Raises:
            ConfigError: as `trim_of`.
        """
        trim_of(model_config.hf_config)
        model_config.hf_config.is_encoder_decoder = True
        model_config.__dict__.pop("is_encoder_decoder", None)  # vLLM has asked before, and remembers
        model_config.multimodal_config.mm_processor_cache_gb = 0  # a picture goes with its question, never alone

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the rest, and take the scheduler that keeps images in order.

        Raises:
            EngineError: something is set in a way that trimming was not made for, or not tested with.
        """
        check_values("vLLM", vllm_config, _REQUIRED)
        model, scheduling = vllm_config.model_config.hf_config, vllm_config.scheduler_config
        try:
            check_values("vLLM", vllm_config, _TRIED)
        except EngineError as error:
            if not _options(model).get(_ALLOW):
                remedy = f'To try it all the same, add "{_ALLOW}": true to the options of crosstrim.'
                raise EngineError(f"{error} {remedy}") from None
            warnings.warn(str(error), CrosstrimWarning, stacklevel=2)
        if scheduling.scheduler_cls not in (None, SCHEDULER):
            raise EngineError(
                f"scheduler_cls={scheduling.scheduler_cls!r} is in the place of crosstrim's; leave it out."
            )
        heads, ranks = model.text_config.num_key_value_heads, vllm_config.parallel_config.tensor_parallel_size
        if heads % ranks:
            raise EngineError(
                f"{heads} key/value heads cannot be divided over {ranks} ranks; take a divisor of {heads}."
            )
        scheduling.scheduler_cls = SCHEDULER
        model.max_source_positions = scheduling.max_num_encoder_input_tokens  # as far as CUDA graphs must reach


def _options(model: Any) -> dict[str, Any]:
    return read_options(getattr(model, "crosstrim", None) or {}, os.environ, [_ALLOW])


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
    values = given(config)
    config_for("vLLM", values, count_beforehand=True)
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    arguments += ["--model", str(mini.path()) if model == "mini" else model, "--served-model-name", model]
    arguments += ["--host", host, "--port", str(port), "--tensor-parallel-size", str(tensor_parallel)]
    arguments += ["--hf-overrides", json.dumps({"crosstrim": values})]
    arguments += ["--dtype", "float32"] if model == "mini" else []
    return [*arguments, *options], {"VLLM_USE_V2_MODEL_RUNNER": "0"}


def serve(model: str, config: TrimConfig, **options: Any) -> NoReturn:
    """Print the command and become vLLM's server. Takes what `command` takes, and does not return.

    Raises:
        MissingExtraError: vLLM is not installed.
        ConfigError: vLLM cannot have that trimming.
    """
    process.become("vLLM", *command(model, config, **options))
