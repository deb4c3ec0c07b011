"""Compiled decoding on a GPU: CUDA graphs, few of them, and a host that waits for nothing."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticLayer

import crosstrim
from crosstrim.models.names import cache_keyword
from tests.support import tiny
from tests.support.gpu import DEVICE, REHEARSAL, on_device, run
from tests.support.tiny import Image

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="its static cache has no room for Mllama, trimmed or not",
)
SAMPLES = [[2, Image(4), 9], [1, Image(1, seed=1), 4]]


def how():
    """CUDA graphs; on a CPU the tracing alone."""
    if REHEARSAL:
        config = CompileConfig(fullgraph=True, dynamic=False, mode="default", backend="eager")
        config._compile_all_devices = True
        return config
    return CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("options", [{}, {"k": 0.1}, {"keep": 7, "trim_first_layer": False}], ids=str)
@pytest.mark.parametrize("samples", [SAMPLES[:1], SAMPLES], ids=["single", "ragged"])
def test_graphs_give_the_tokens_of_the_dynamic_cache(model, dtype, samples, options):
    batch = on_device(tiny.inputs(*samples), dtype)
    with crosstrim.trim(model, **options):
        expected = run(model, batch, max_new_tokens=12)
        for _ in range(2):  # the second request replays what the first recorded
            out = run(model, batch, max_new_tokens=12, cache_implementation="static", compile_config=how())
            if dtype == torch.float32:
                assert torch.equal(out.sequences, expected.sequences)
                torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("options", [{"k": 0.1}, {"keep": 7}], ids=str)
def test_a_compiled_step_never_waits_for_the_device(model, dtype, options):
    batch = on_device(tiny.inputs(SAMPLES[0]), dtype)
    rows = batch["input_ids"].shape[1]
    cache = StaticCache(model.config.text_config, max_cache_len=32)
    for index in tiny.CROSS_LAYERS:
        cache.layers[index] = StaticLayer(max_cache_len=tiny.FEATURES_PER_IMAGE)
    held = {cache_keyword(): cache}
    backend = {"backend": "eager"} if REHEARSAL else {"mode": "reduce-overhead"}
    mask = batch["cross_attention_mask"][:, -1:].clone()
    with torch.no_grad(), crosstrim.trim(model, **options):
        token = model(**batch, **held).logits[:, -1:].argmax(-1)
        step = torch.compile(model.forward, fullgraph=True, **backend)
        positions = torch.full((1, 1), rows, device=DEVICE)

        def go_on(waiting):
            nonlocal token, positions
            with waiting:
                logits = step(input_ids=token, position_ids=positions, cross_attention_mask=mask, **held).logits
                token, positions = logits[:, -1:].argmax(-1).clone(), positions + 1

        for _ in range(4):  # compiles, warms up and records
            go_on(contextlib.nullcontext())
        for _ in range(8):
            go_on(_no_waiting())


@contextlib.contextmanager
def _no_waiting():
    if REHEARSAL:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
