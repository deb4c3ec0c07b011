"""A prompt makes the host wait for the device once, whatever the trim, on a device that counts."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import crosstrim
from crosstrim.models import compat
from crosstrim.models.names import cache_keyword
from tests.support import tiny
from tests.support.devices import MadeOfNumbers
from tests.support.watched_device import DEVICE, device

TRIMS = [
    *({}, {"k": 0.3}, {"k": 0.3, "rating_rows": "last_turn"}, {"keep": 1.0}, {"keep": 0.3, "kv_dtype": "int8"}),
    *({"keep": 0.3, "policy": name} for name in ("union", "contribution", "mmr", "dpp", "value", "grid", "random:3")),
    *({"k": 0.3, "policy": "contribution"}, {"policy": "mass:0.5"}, {"k": 0.3, "policy": "pyramid:0.4"}),
    *({"keep": 0.3, "merge": True}, {"k": 0.3, "merge": True}),
]


def moved(model):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.data.to(DEVICE), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(DEVICE)
    return model


def prompt(*samples):
    """With features in place of pictures: the vision tower is torch's and transformers' alone."""
    batch = tiny.inputs(*samples)
    states = torch.randn(len(samples) * 4 * batch["pixel_values"].shape[1], tiny.FEATURES_PER_TILE, 64)
    pixels = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    return {name: one for name, one in batch.items() if name not in pixels} | {"cross_attention_states": states}


def repaired():
    model = tiny.build()
    compat.apply(model)
    return model


def there(batch):
    return {name: one.to(DEVICE) for name, one in batch.items()}


def run(model, batch, trim):
    cache = DynamicCache(config=model.config.text_config)
    with trim:
        logits = model(**batch, **{cache_keyword(): cache}).logits
    return logits, cache


def looks_of(batch, options):
    """Beyond those of the untrimmed model; and the logits, and the keys that stay in the later layers."""
    with device() as looks, MadeOfNumbers():
        model, batch = moved(repaired()), there(batch)
        run(model, batch, contextlib.nullcontext())
        untrimmed = list(looks)
        trim = crosstrim.trim(model, **options)
        looks.clear()
        logits, cache = run(model, batch, trim)
        assert looks[: len(untrimmed)] == untrimmed
        return looks[len(untrimmed) :], logits.values, cache.layers[tiny.CROSS_LAYERS[1]].keys.values


@pytest.mark.parametrize("options", TRIMS, ids=str)
def test_a_prompt_is_looked_at_once_and_chosen_from_as_on_a_cpu(options):
    torch.manual_seed(1)
    batch = prompt([2, tiny.Image(2), 5], [1, tiny.Image(4), 4], [3, tiny.Image(1), tiny.Image(2), 1])
    looks, logits, keys = looks_of(batch, options)
    assert looks == ["tolist"]
    model = repaired()
    with torch.no_grad():
        expected, cache = run(model, batch, crosstrim.trim(model, **options))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(keys, cache.layers[tiny.CROSS_LAYERS[1]].keys, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"k": 0.3}, {"keep": 0.3}, {"keep": 0.3, "merge": True}], ids=str)
def test_an_image_that_is_appended_makes_it_wait_once_too(options):
    both = prompt([2, tiny.Image(4), 8, tiny.Image(2), 6])
    mask, states = both["cross_attention_mask"], both["cross_attention_states"]
    first = {"cross_attention_mask": mask[:, :12, :1], "cross_attention_states": states[:4]}
    second = {"cross_attention_mask": mask, "cross_attention_states": states[4:]}
    turns = [first | {"input_ids": both["input_ids"][:, :12]}, second | {"input_ids": both["input_ids"][:, 12:]}]
    with device() as looks, MadeOfNumbers():
        model, cache = moved(repaired()), DynamicCache()
        with crosstrim.trim(model, **options):
            for turn in map(there, turns):
                looks.clear()
                model(**turn, **{cache_keyword(): cache})
                assert looks == ["tolist"]
