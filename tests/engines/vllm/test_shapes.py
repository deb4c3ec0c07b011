"""A random model with heads that vLLM's kernels know, and with the rotary embedding of Llama-3.2."""

from __future__ import annotations

import pytest
import torch
from transformers import MllamaConfig

import crosstrim
from crosstrim import mini
from tests.support import vllm_runs as runs
from tests.support.tiny import randomised

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("wide")
    config = MllamaConfig.from_pretrained(mini.path())
    rotary = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rotary |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config.text_config.update({"hidden_size": 256, "rope_parameters": rotary})
    config.dtype = torch.float32
    randomised(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trim", [{}, {"keep": 0.2}], ids=str)
def test_tokens(start, checkpoint, mixed, trim):
    engine = start(trim, model=checkpoint)
    assert {layer.missing for layer in engine.network.modules() if hasattr(layer, "missing")} == {0}
    model, processor = crosstrim.load(checkpoint)
    few = mixed[:4] + mixed[-1:]
    assert engine.answer(few) == runs.reference(model, processor, few, **trim)
