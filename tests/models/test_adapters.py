"""Adapters that PEFT puts on a model: what is trimmed, and what is held of pictures, is the adapted model's."""

from __future__ import annotations

import pytest
import torch

import crosstrim
from crosstrim.models import compat, mllama, vision
from tests.support import tiny
from tests.support.passes import kept
from tests.support.tiny import Image

peft = pytest.importorskip("peft")
SINGLE = [2, Image(4), 9]
TOWER = r".*vision_model.*(fc1|q_proj|v_proj)"
PROJECTOR = r".*multi_modal_projector"
CROSS_ATTENTION = r".*cross_attn\.(q_proj|k_proj|v_proj|o_proj)"


def adapted(where, seed=0, names=("one",)):
    model = tiny.build()
    compat.apply(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=where, init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, config)
    return wrapped.eval()


@pytest.mark.parametrize("where", [TOWER, PROJECTOR], ids=["tower", "projector"])
def test_held_features_are_those_of_the_adapter_that_is_on(where):
    model, store, batch = adapted(where, names=("one", "two")), crosstrim.FeatureCache(), tiny.inputs(SINGLE)

    def check():
        found = store.features(model, batch)
        assert torch.equal(found, vision.encode(model, batch).to(found))
        return found

    one = check()
    model.set_adapter("two")
    two = check()
    with model.disable_adapter():
        none = check()
    assert not torch.equal(one, two)
    assert not torch.equal(one, none)
    assert torch.equal(check(), two)
    model.set_adapter("one")
    assert torch.equal(check(), one)
    assert len(store) == 3  # nothing was encoded twice
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)
    assert not torch.equal(check(), one)
    model.merge_adapter()
    check()


def test_held_features_follow_weights_that_are_written(model):
    store, batch = crosstrim.FeatureCache(), tiny.inputs(SINGLE)
    first = store.features(model, batch)
    with torch.no_grad():
        model.model.multi_modal_projector.weight.mul_(2)
        assert not torch.equal(store.features(model, batch), first)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert store.features(model, batch).dtype == torch.bfloat16


def test_the_state_of_a_tower_is_found_quickly_and_does_not_wander(model):
    states = {vision.state_of(model) for _ in range(3)}
    with crosstrim.trim(model, k=0.1):
        model.generate(**tiny.inputs(SINGLE), max_new_tokens=2)
        states.add(vision.state_of(model))
    assert len(states) == 1


@pytest.mark.parametrize("options", [{"k": 0.1}, {"keep": 9}], ids=str)
def test_the_choice_is_the_adapted_models(options):
    wrapped, batch = adapted(CROSS_ATTENTION), tiny.inputs(SINGLE)
    inner = wrapped.get_base_model()
    with torch.no_grad():
        with crosstrim.trim(wrapped, **options) as trimmed:
            logits, with_adapter = wrapped(**batch).logits, kept(trimmed)
            with wrapped.disable_adapter():
                wrapped(**batch)
                without = kept(trimmed)
        merged = wrapped.merge_and_unload()
        with crosstrim.trim(merged, **options) as trimmed:
            torch.testing.assert_close(merged(**batch).logits, logits, atol=1e-4, rtol=0)
            assert kept(trimmed) == with_adapter != without
    assert mllama.locate(merged).model is inner.model
