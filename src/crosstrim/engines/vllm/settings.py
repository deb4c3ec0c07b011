"""What is trimmed under vLLM, and what vLLM must be told for it before the engine starts."""

from __future__ import annotations

import os
from typing import Any

from crosstrim.config import TrimConfig
from crosstrim.engines.prompt import PromptTrim
from crosstrim.engines.settings import config_for, read_options
from crosstrim.errors import ConfigError, EngineError
from crosstrim.models import mllama

SCHEDULER = "crosstrim.engines.vllm.scheduler.scheduler"


def trim_of(hf_config: Any) -> PromptTrim:
    """What to trim: the object "crosstrim" of the model's config, or the environment.

    Args:
        hf_config: an `MllamaConfig`.

    Raises:
        ConfigError: an option is unknown or out of range, or what stays is not known before the prompt is computed.
    """
    config = config_for("vLLM", read_options(getattr(hf_config, "crosstrim", None) or {}, os.environ))
    trim = PromptTrim(
        check(config),
        mllama.geometry_of(hf_config),
        hf_config.image_token_index,
        mllama.LLAMA_USER_TURN_IDS
        if hf_config.text_config.vocab_size == mllama.LLAMA_VOCABULARY_SIZE
        else None,
    )
    return trim


def check(config: TrimConfig) -> TrimConfig:
    return config


class ModelSettings:
    """What vLLM asks of an architecture before it builds anything."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Say that images are read through cross-attention."""
        trim_of(model_config.hf_config)
        model_config.hf_config.is_encoder_decoder = True
        model_config.__dict__.pop("is_encoder_decoder", None)  # it was asked for before
        model_config.multimodal_config.mm_processor_cache_gb = 0

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Take the scheduler that hands pictures over in the order of the batch."""
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
