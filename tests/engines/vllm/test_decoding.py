"""The decoding path is tensors alone, so that CUDA graphs can hold it; a prompt looks at the host once a batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crosstrim.engines.prompt import PromptTrim
from crosstrim.errors import EngineError
from tests.support import vllm_runs as runs

pytestmark = pytest.mark.vllm


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    waits = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(self.waits):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


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


@pytest.fixture(scope="module")
def engine(start):
    return start({"keep": 0.3})


@pytest.fixture
def network(engine):
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def metadata(starts, slots):
    return SimpleNamespace(
        query_start_loc=torch.tensor(starts, dtype=torch.int32), seq_lens=torch.tensor(slots, dtype=torch.int32)
    )


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


def test_a_batch_of_prompts_looks_at_the_host_once(engine, network, processor, monkeypatch):
    """Here, for what it is to compute; tests/engines/test_looks.py says that computing it takes no look."""
    from crosstrim.engines.vllm import model

    steps, step_of = [], model._step_of

    def watched(*args):
        calls, looks = count_lists(monkeypatch), Looks()
        with looks:
            step = step_of(*args)
        monkeypatch.undo()
        monkeypatch.setattr(model, "_step_of", watched)
        steps.append((len(step.prompts), [call for call in calls if call == "tolist"]))
        return step

    monkeypatch.setattr(model, "_step_of", watched)
    row = runs.rows_of("2x2")[0]
    engine.answer([runs.request(processor, row["question"], [row["image"]], 3)] * 3)
    assert max(prompts for prompts, _ in steps) == 3
    assert all(len(calls) <= 1 for _, calls in steps)
    assert all(calls == [] for prompts, calls in steps if prompts == 0)


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
