"""What transformers' versions call differently: found out, never warned about, refused by name when it is gone."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache
from transformers.models.mllama.modeling_mllama import MllamaModel

import crosstrim
from crosstrim.bench import layers
from crosstrim.errors import IncompatibleTransformersError
from crosstrim.models import continuation, names
from tests import tiny
from tests.model.test_session import PICTURE, QUESTIONS
from tests.tiny import Image

BATCH = ([2, Image(4), 9], [1, Image(1, seed=1), 4])


@pytest.fixture
def deprecations_are_errors():
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", category)
        # transformers 5.17.0 says so of its own vision tower's call, trimmed or not.
        warnings.filterwarnings("ignore", "`hidden_state` is deprecated")
        yield


@pytest.mark.usefixtures("deprecations_are_errors")
@pytest.mark.parametrize("options", [{}, {"k": 0.1}, {"keep": 7, "kv_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_trimmed_generation_asks_for_nothing_deprecated(model, options, use_cache):
    with crosstrim.trim(model, **options) as trimmed:
        model.generate(**tiny.inputs(*BATCH), max_new_tokens=3, use_cache=use_cache)
        assert trimmed.report().samples


@pytest.mark.usefixtures("deprecations_are_errors")
def test_our_own_passes_ask_for_nothing_deprecated(model):
    batch = tiny.inputs(*BATCH)
    tokens = torch.tensor([[5, 6], [7, 8]])
    assert continuation.logits(model, batch, tokens, torch.ones_like(tokens)).shape[:2] == (2, 2)
    measured = layers.run(**layers.SETTINGS["tiny"])
    assert next(measured)["way"] == "untrimmed"
    measured.close()


@pytest.mark.usefixtures("deprecations_are_errors")
def test_a_session_asks_for_nothing_deprecated(checkpoint):
    session = crosstrim.Session(*crosstrim.load(checkpoint), PICTURE, keep=5)
    assert session.ask(QUESTIONS[0], max_new_tokens=2).report.kept == 5


def test_a_caller_may_use_every_name_that_his_transformers_takes(model):
    batch = tiny.inputs(*BATCH)
    accepted = [names.cache_keyword()]
    if accepted == ["cache"]:
        accepted.append("past_key_values")
    step = {
        "input_ids": torch.tensor([[5], [6]]),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1),
    }
    logits = []
    with torch.no_grad(), warnings.catch_warnings(), crosstrim.trim(model, k=0.1) as trimmed:
        warnings.simplefilter("ignore", FutureWarning)
        for name in accepted:
            cache = DynamicCache(config=model.config.text_config)
            model(**batch, **{name: cache})
            logits.append(model(**step, **{name: cache}).logits)
            assert trimmed.report(cache).kept < trimmed.report(cache).visible
    assert all(torch.equal(one, logits[0]) for one in logits)


def test_the_name_is_the_one_in_the_installed_signature():
    assert names.cache_keyword() in inspect.signature(MllamaModel.forward).parameters


def test_a_version_without_any_known_name_is_refused_before_anything_is_put_on(model, monkeypatch):
    def forward(self, input_ids=None, kv=None, **kwargs):
        raise AssertionError("nothing may run")

    monkeypatch.setattr(MllamaModel, "forward", forward)
    names.cache_names.cache_clear()
    try:
        before = len(model.model._forward_pre_hooks)
        with pytest.raises(IncompatibleTransformersError, match=r"KV cache by none of cache, past_key_values"):
            crosstrim.trim(model, k=0.1)
        assert len(model.model._forward_pre_hooks) == before
    finally:
        names.cache_names.cache_clear()
