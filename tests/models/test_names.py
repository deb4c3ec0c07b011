"""What transformers' versions call differently: found out, never warned about, refused by name when it is gone."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch
from transformers import DynamicCache
from transformers.models.mllama import modeling_mllama as modeling

import crosstrim
from crosstrim.asking import environment
from crosstrim.bench import layers
from crosstrim.errors import CrosstrimError, IncompatibleTransformersError, NotTrimmedError
from crosstrim.models import continuation, mllama, names, probe
from tests.support import tiny
from tests.support.passes import hooks_on
from tests.support.questions import PICTURE, QUESTIONS
from tests.support.tiny import Image

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
    assert names.cache_keyword() in inspect.signature(modeling.MllamaModel.forward).parameters


@pytest.fixture
def fresh_probes():
    """What was found out about the installed transformers is found out again."""
    caches = (names.cache_names, probe.check_interface)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


def without_the_name(monkeypatch):
    def forward(self, input_ids=None, kv=None, **kwargs):
        raise AssertionError("nothing may run")

    monkeypatch.setattr(modeling.MllamaModel, "forward", forward)


def without_keywords(monkeypatch):
    """A decoder layer that hands down what it knows alone."""
    real = modeling.MllamaCrossAttentionDecoderLayer.forward
    known = inspect.signature(real).parameters

    def forward(self, *args, **kwargs):
        return real(self, *args, **{name: one for name, one in kwargs.items() if name in known})

    monkeypatch.setattr(modeling.MllamaCrossAttentionDecoderLayer, "forward", forward)


def without_the_interface(monkeypatch):
    """Attention that does not ask which function its config names."""
    real = modeling.MllamaTextCrossAttention.forward

    def forward(self, *args, **kwargs):
        config, self.config = self.config, modeling.MllamaTextConfig()
        self.config._attn_implementation = "eager"
        try:
            return real(self, *args, **kwargs)
        finally:
            self.config = config

    monkeypatch.setattr(modeling.MllamaTextCrossAttention, "forward", forward)


def with_strict_forwards(monkeypatch):
    """A model that refuses keywords it does not know."""
    real = modeling.MllamaTextModel.forward
    known = inspect.signature(real).parameters

    def forward(self, *args, **kwargs):
        for name in kwargs:
            if name not in known:
                raise TypeError(f"unexpected keyword argument {name!r}")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(modeling.MllamaTextModel, "forward", forward)


@pytest.mark.usefixtures("fresh_probes")
@pytest.mark.parametrize(
    ("change", "wording"),
    [
        (without_the_name, r"takes the KV cache by none of cache, past_key_values"),
        (without_keywords, r"does not reach the attention"),
        (without_the_interface, r"does not reach the attention"),
        (with_strict_forwards, r"breaks its Mllama \(unexpected keyword argument 'crosstrim_pass'\)"),
    ],
)
def test_a_transformers_that_cannot_be_trimmed_is_refused_before_anything_is_put_on(
    model, monkeypatch, change, wording
):
    before = hooks_on(model)
    configs = [layer.cross_attn.config for layer in mllama.locate(model).cross_layers]
    change(monkeypatch)
    with pytest.raises(IncompatibleTransformersError, match=f"{wording}.*Install another version"):
        crosstrim.trim(model, k=0.1)
    assert hooks_on(model) == before
    assert all(
        layer.cross_attn.config is config
        for layer, config in zip(mllama.locate(model).cross_layers, configs, strict=True)
    )
    told = environment.trimming()
    assert not told["works"]
    assert re.search(wording, told["problem"])


@pytest.mark.parametrize("change", [without_keywords, without_the_interface])
def test_a_layer_that_loses_the_keyword_after_trim_does_not_run_untrimmed_in_silence(model, monkeypatch, change):
    with torch.no_grad(), crosstrim.trim(model, k=0.1) as trimmed:
        change(monkeypatch)
        with pytest.raises(NotTrimmedError, match="attended to it without crosstrim"):
            model(**tiny.inputs(*BATCH))
        with pytest.raises(NotTrimmedError, match="attended to it without crosstrim"):
            model.generate(**tiny.inputs(*BATCH), max_new_tokens=2)
        with pytest.raises(CrosstrimError, match="nothing was generated yet"):
            trimmed.report()
