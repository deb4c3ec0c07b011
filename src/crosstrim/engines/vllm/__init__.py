"""A plugin that brings Llama-3.2-Vision ("Mllama") back to vLLM, trimmed; installing crosstrim beside vLLM is all."""

from __future__ import annotations

ARCHITECTURE = "MllamaForConditionalGeneration"


def register() -> None:
    """Make the architecture known. vLLM calls this in every process, whatever model it runs there."""
    import vllm
    from vllm import ModelRegistry

    from crosstrim.engines.vllm import launch

    ModelRegistry.register_model(ARCHITECTURE, f"crosstrim.engines.vllm.model:{ARCHITECTURE}")
    if launch.is_tested(vllm.__version__):  # in another version the model says so, once it is asked for
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        MODELS_CONFIG_MAP[ARCHITECTURE] = launch.EngineSettings
