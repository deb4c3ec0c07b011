"""How little of crosstrim there is in a running model: hooks on it, and Python calls in a decoding step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import crosstrim
from crosstrim.models import compat
from crosstrim.models.names import cache_keyword
from tests.support import tiny
from tests.support.passes import grow, hooks_on
from tests.support.tiny import Image

PACKAGE = str(Path(crosstrim.__file__).parent)


def build(layers=8, cross_layers=tiny.CROSS_LAYERS):
    config = tiny.config()
    config.text_config.num_hidden_layers = layers
    config.text_config.cross_attention_layers = list(cross_layers)
    model = tiny.randomised(config).eval()
    compat.apply(model)
    return model


@pytest.fixture(scope="module")
def as_11b():
    """11B's layout: 40 layers, 8 of which attend to images."""
    return build(40, range(3, 40, 5))


def test_hooks_on_a_model_of_the_layout_of_11b(as_11b):
    before = hooks_on(as_11b)
    with crosstrim.trim(as_11b, k=0.25):
        assert hooks_on(as_11b) - before <= 12  # two on the model, one on its head, one on each layer


def calls_in_a_step(model, options):
    batch, calls = tiny.inputs([2, Image(4), 9]), []
    held = {cache_keyword(): DynamicCache(config=model.config.text_config)}
    later = grow(batch, torch.tensor([[5]]))
    step = {"input_ids": later["input_ids"][:, -1:], "attention_mask": later["attention_mask"]}
    step["cross_attention_mask"] = later["cross_attention_mask"]

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(frame.f_code.co_qualname)

    with torch.no_grad(), crosstrim.trim(model, **options):
        model(**batch, **held)
        sys.setprofile(count)
        try:
            model(**step, **held)
        finally:
            sys.setprofile(None)
    return calls


@pytest.mark.parametrize("options", [{}, {"k": 0.25}, {"keep": 7}], ids=str)
def test_python_calls_in_a_decoding_step(options):
    # It was 104 when norms and projections were hooked; at most three fifths of that, the repairs' six among them.
    assert len(calls_in_a_step(build(), options)) <= 62


def test_python_calls_grow_with_the_layers_alone(as_11b):
    few, many = len(calls_in_a_step(build(), {"k": 0.25})), len(calls_in_a_step(as_11b, {"k": 0.25}))
    assert many - few <= 5 * 12  # five layers more
