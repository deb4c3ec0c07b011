"""What is refused, by whom, and that the engine goes on."""

from __future__ import annotations

import re

import pytest
import torch

from crosstrim.engines.vllm import launch
from crosstrim.errors import EngineError
from tests.support import vllm_runs as runs

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("trim", "message"),
    [
        ({"k": 0.25}, r"k=0\.25 lets the prompt decide .* vLLM must know it before.* keep=.*crosstrim calibrate"),
        ({"policy": "mass:0.9"}, "policy='mass:0.9' lets the prompt decide"),
        ({"keep": 0.5, "policy": "pyramid"}, "policy='pyramid' keeps less from layer to layer"),
        ({"keep": 0.5, "trim_first_layer": False}, "trim_first_layer=False"),
        ({"keep": 0.5, "kv_dtype": "int8"}, "kv_dtype='int8' cannot be had in vLLM"),
        ({"keep": 0.5, "merge": True}, "merge=True cannot be had in vLLM.*leave it out"),
        ({"keep": 1.5}, r"keep=1\.5 must be a share"),
        ({"kept": 5}, "unknown option 'kept'"),
    ],
    ids=str,
)
def test_at_the_start_options(start, trim, message):
    with pytest.raises(ValueError, match=message):
        start(trim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "3 ranks cannot share 4 key/value heads"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls=.* no --scheduler-cls"),
        ({"kv_cache_dtype": "fp8"}, "cache_dtype='fp8'; start it with no --kv-cache-dtype"),
        ({"quantization": "fp8"}, "quantization='fp8'; start it with the checkpoint as it was"),
    ],
    ids=str,
)
def test_at_the_start_settings_of_vllm(start, options, message):
    with pytest.raises(Exception, match=message):  # some are wrapped by vLLM
        start({}, **options)


def test_another_version():
    tested = [launch.is_tested(version) for version in ("0.32.0+cpu", "0.32.1", "0.31.2", "0.33.0")]
    assert tested == [True, True, False, False]


def test_another_version_is_left_alone_until_the_model_is_asked_for(monkeypatch):
    import importlib

    import vllm
    from vllm.model_executor.models import config

    import crosstrim.engines.vllm as plugin
    import crosstrim.engines.vllm.model as model

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    monkeypatch.delitem(config.MODELS_CONFIG_MAP, plugin.ARCHITECTURE, raising=False)
    plugin.register()
    assert plugin.ARCHITECTURE not in config.MODELS_CONFIG_MAP
    with pytest.raises(EngineError, match=r"vLLM 0\.33\.0 was not tested with crosstrim; install vllm~=0\.32\.0"):
        importlib.reload(model)


def spoilt(processor):
    """Twenty requests, each of which is refused, and why."""
    four = runs.rows_of("2x2")[0]
    good = runs.request(processor, four["question"], [four["image"]], 12)
    two = runs.request(processor, four["question"], [four["image"]] * 2, 12)
    image_id, prompt = good.ids.index(416), good.prompt()
    apart = [*good.ids, 10, 416, 11]

    def with_options(options):
        return {**prompt, "mm_processor_kwargs": options}

    def with_images(images, ids=good.ids):
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}

    image = prompt["multi_modal_data"]["image"][0]
    return [
        *((with_options({"crosstrim": {"keep": keep}}), "keep=.* must be") for keep in (0, -1, 1.5, "much", True)),
        (with_options({"crosstrim": {"k": 0.5}}), "must be of the form"),
        (with_options({"crosstrim": {"keep": 0.5, "policy": "mmr"}}), "must be of the form"),
        (with_options({"crosstrim": 0.5}), "must be of the form"),
        (with_options({"keep": 0.5}), "must be of the form"),
        (with_options({"size": {"height": 8, "width": 8}}), "must be of the form"),
        (with_options({"crosstrim": {"keep": 0.5}, "max_image_tiles": 1}), "must be of the form"),
        (with_images([image] * 4, [416] * 4 + good.ids[image_id + 1 :]), "At most 3 image"),
        (with_images([image] * 9), "At most 3 image"),
        (with_images([image, image]), "1 image tokens .* for 2 pictures"),
        (with_images([image], two.ids), "2 image tokens .* for 1 pictures"),
        (with_images([image, image], apart), "text between two pictures"),
        (with_images([torch.zeros(0, 0, 3).numpy()]), "could not be read"),
        (with_images([torch.full((3, 2), torch.nan).numpy()]), "could not be read"),
        ({**prompt, "prompt_token_ids": good.ids + [10] * 600}, "maximum context length"),
        ({"prompt_token_ids": [10] * 600}, "maximum context length"),
    ]


def test_twenty_bad_requests_among_good_ones(start, processor, mixed, expected):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    engine = start({"keep": 0.3}, limit_mm_per_prompt={"image": 3})
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)
    bad, messages, done = spoilt(processor), [], {}
    assert len(bad) == 20
    core = engine.llm.llm_engine
    for place in range(max(len(bad), len(mixed))):
        if place < len(mixed):
            core.add_request(str(place), mixed[place].prompt(), sampling)
        if place < len(bad):
            with pytest.raises((ValueError, VLLMValidationError)) as error:  # looked at below
                core.add_request(f"bad {place}", bad[place][0], sampling)
            messages.append(str(error.value))
        done |= {output.request_id: output for output in core.step() if output.finished}
    while core.has_unfinished_requests():
        done |= {output.request_id: output for output in core.step() if output.finished}
    for message, (_, wanted) in zip(messages, bad, strict=True):
        assert re.search(wanted, message), message
    answers = [list(done[str(place)].outputs[0].token_ids) for place in range(len(mixed))]
    assert answers == expected(keep=0.3)
    assert engine.free_blocks == engine.blocks
