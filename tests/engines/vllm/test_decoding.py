"""The decoding path is tensors alone, so that CUDA graphs can hold it; a prompt looks at the host once a batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crosstrim.engines.prompt import PromptTrim
from crosstrim.errors import EngineError
from tests.support.watched_device import DEVICE, device

pytestmark = pytest.mark.vllm


def count_lists(monkeypatch):
    """`tolist` copies without any operator that a dispatch mode would see."""
    calls = []
    for name in ("tolist", "item"):
        stock = getattr(torch.Tensor, name)

        def counted(tensor, stock=stock, name=name):
            calls.append(name)
            return stock(tensor)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return calls


@pytest.fixture
def engine(start):
    return start({"keep": 0.3})


@pytest.fixture
def network(engine):
    return engine.network


def metadata(starts, slots, place="cpu"):
    query_start_loc, seq_lens = (torch.tensor(numbers, dtype=torch.int32).to(place) for numbers in (starts, slots))
    return SimpleNamespace(query_start_loc=query_start_loc, seq_lens=seq_lens)


def test_decoding_runs_on_tensors_that_hold_nothing(engine, monkeypatch):
    """Requests in a padded batch, two with pictures; whoever looked at a value would find that there is none."""
    from vllm.config import set_current_vllm_config

    from crosstrim.engines.vllm import model

    asked = []

    def attention(self, query, key, value):
        asked.append((key, value))
        return torch.empty_like(query.flatten(1))

    config = engine.llm.llm_engine.vllm_config
    monkeypatch.setattr(config.compilation_config, "static_forward_context", {})
    monkeypatch.setattr(model.Attention, "forward", attention)
    monkeypatch.setattr(PromptTrim, "largest", lambda trim, images: 78)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with set_current_vllm_config(config):
            network = model.MllamaForConditionalGeneration(vllm_config=config)
        for module in network.modules():  # vLLM's kernels for the CPU know no tensors without content
            if hasattr(module, "_forward_method"):
                module._forward_method = module.forward_native
            module.cpu_linear = torch.nn.functional.linear
        given = metadata([0, 1, 2, 3, 3], [78, 0, 40, 0])
        monkeypatch.setattr(
            model, "get_forward_context", lambda: SimpleNamespace(attn_metadata={network._reads: given})
        )
        ids, positions = torch.ones(4, dtype=torch.long), torch.tensor([30, 40, 50, 0])
        calls = count_lists(monkeypatch)
        hidden = network(ids, positions, encoder_outputs=[])
    assert hidden.shape == (4, 192)
    assert len(asked) == 9  # layers
    assert [key is None for key, _ in asked].count(True) == 3  # cross-attention layers write nothing
    assert calls == []


def test_which_rows_see_an_image():
    from crosstrim.engines.vllm import model

    rows = torch.arange(7)
    step = model._step_of(metadata([0, 1, 4, 5, 5], [78, 0, 40, 0]), rows, rows, [])
    assert step.sees.flatten().tolist() == [True, False, False, False, True, False, False]  # the last two are padding
    assert step.prompts == []


def test_a_batch_of_prompts_looks_at_the_host_once(network):
    """Here, for what it is to compute; tests/engines/test_looks.py says that computing it takes no look."""
    from crosstrim.engines.vllm import model

    starts, slots = [0, 4, 5, 9, 13], [78, 0, 78, 78]  # the second is text that was generated
    positions = torch.tensor([*range(4), 40, *range(4), *range(4)])
    with device() as looks:
        given = metadata(starts, slots, DEVICE)
        images = [torch.zeros(260, 192).to(DEVICE) for _ in range(3)]
        for features in images:
            features.crosstrim = network.trim, [408, 416, 5, 6], [4]
        rows = torch.ones(13, dtype=torch.long).to(DEVICE), positions.to(DEVICE)
        step = model._step_of(given, *rows, images)
        assert looks == ["tolist"]
        assert model._step_of(given, *rows, []).prompts == []
        assert looks == ["tolist"]
    assert [prompt.rows for prompt in step.prompts] == [slice(0, 4), slice(5, 9), slice(9, 13)]


def test_pictures_of_another_request_are_refused(network):
    from crosstrim.engines.vllm import model

    ids = [408, 416, 5, 6]
    features = torch.zeros(260, 192)
    features.crosstrim = network.trim, ids, [4]
    tokens, positions = torch.tensor(ids), torch.arange(4)
    step = model._step_of(metadata([0, 4], [78]), tokens, positions, [features])
    assert [prompt.rows for prompt in step.prompts] == [slice(0, 4)]
    with pytest.raises(EngineError, match="the images of another one"):
        model._step_of(metadata([0, 4], [20]), tokens, positions, [features])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_builds_and_answers(start, mixed, dtype):
    engine = start({"keep": 0.3}, dtype=dtype)
    assert [len(answer) for answer in engine.answer(mixed[:4])] == [12] * 4
