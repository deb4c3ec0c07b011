"""A plugin that brings Llama-3.2-Vision ("Mllama") back to vLLM, trimmed.

vLLM finds `register` by the entry point `crosstrim` of the group `vllm.general_plugins`. Only the other modules here
need vLLM to be imported.
"""

from __future__ import annotations

ARCHITECTURE = "MllamaForConditionalGeneration"


def register() -> None:
    """Make the architecture known; vLLM calls this in every process, maybe more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from crosstrim.engines.vllm.settings import ModelSettings

    ModelRegistry.register_model(ARCHITECTURE, f"crosstrim.engines.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ModelSettings
