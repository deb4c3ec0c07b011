"""What vLLM has to be told for a trimmed Mllama, what is refused, and the command that starts its server."""

from __future__ import annotations

import os
from typing import Any

from packaging.version import Version

from crosstrim.engines.process import Server
from crosstrim.engines.prompt import PromptTrim
from crosstrim.engines.settings import check_values, config_for, read_options
from crosstrim.errors import EngineError

TESTED = "0.32"
SCHEDULER = "crosstrim.engines.vllm.scheduler.scheduler"

# What vLLM's configuration must say, and what makes it say it.
_REQUIRED = {
    "use_v2_model_runner": (False, "VLLM_USE_V2_MODEL_RUNNER=0 in the environment"),
    "model_config.quantization": (None, "the checkpoint as it was before it was quantised, and no --quantization"),
    "cache_config.cache_dtype": ("auto", "no --kv-cache-dtype"),
    "speculative_config": (None, "no --speculative-config"),
    "lora_config": (None, "no --enable-lora"),
    "kv_transfer_config": (None, "no --kv-transfer-config"),
    "parallel_config.pipeline_parallel_size": (1, "--pipeline-parallel-size 1"),
    "parallel_config.decode_context_parallel_size": (1, "--decode-context-parallel-size 1"),
    "parallel_config.use_ubatching": (False, "no --enable-dbo"),
    "scheduler_config.scheduler_cls": (None, "no --scheduler-cls"),
}


def is_tested(version: str) -> bool:
    """Whether the plugin was tested with this version of vLLM."""
    return Version(version).release[:2] == Version(TESTED).release


def trim_of(model: Any) -> PromptTrim:
    """The trim of requests that do not bring their own: "crosstrim" in the model's config, or the environment.

    Args:
        model: an `MllamaConfig`.

    Raises:
        ConfigError: an option is unknown, out of range, given twice, or cannot be had in vLLM.
    """
    options = read_options(getattr(model, "crosstrim", None) or {}, os.environ)
    return PromptTrim.of(config_for("vLLM", options, count_beforehand=True), model)


def images_planned(multimodal_config: Any) -> int:
    """Images of one request that memory is planned for: what --limit-mm-per-prompt says, or one."""
    limited = "image" in multimodal_config.limit_per_prompt
    return max(1, int(multimodal_config.get_limit_per_prompt("image"))) if limited else 1


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
        model_config.multimodal_config.mm_processor_cache_gb = 0  # an image goes with its question, never alone

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the rest, and take the scheduler that keeps images in order.

        Raises:
            EngineError: something is set in a way that trimming was not made for, or ranks cannot share the heads.
        """
        check_values("vLLM", vllm_config, _REQUIRED)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        heads = vllm_config.model_config.hf_config.text_config.num_key_value_heads
        if heads % ranks:
            raise EngineError(f"{ranks} ranks cannot share {heads} key/value heads; take a divisor of {heads}.")
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER


_SERVER = Server(
    engine="vLLM",
    module="vllm.entrypoints.openai.api_server",
    model_option="--model",
    ranks_option="--tensor-parallel-size",
    overrides_option="--hf-overrides",
    check=lambda options: config_for("vLLM", options, count_beforehand=True),
    environment={"VLLM_USE_V2_MODEL_RUNNER": "0"},
)
command, serve = _SERVER.command, _SERVER.serve
