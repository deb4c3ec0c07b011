"""Gradients through a trimmed model, and that computing layers again for them changes nothing."""

from __future__ import annotations

import pytest
import torch

import crosstrim
from crosstrim.models import compat
from tests.support import tiny
from tests.support.passes import hidden_from
from tests.support.tiny import Image

SINGLE = [[2, Image(4), 9]]
RAGGED = [[2, Image(4), 9], [1, Image(1, seed=1), 4]]
PICTURES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def gradients(model, batch, options, given=None):
    """Of every parameter, and of the features where they are given."""
    model.zero_grad()
    inputs = {name: tensor for name, tensor in batch.items() if name not in PICTURES} if given is not None else batch
    if given is not None:
        given = given.detach().clone().requires_grad_()
        inputs = inputs | {"cross_attention_states": given}
    with crosstrim.trim(model, **options) as trimmed:
        loss = model(
            **inputs, labels=batch["input_ids"].masked_fill(batch["input_ids"] == tiny.IMAGE_TOKEN, -100)
        ).loss
        loss.backward()
        samples = trimmed.report().samples
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    if given is not None:
        found["features"] = given.grad.clone()
    return loss.detach(), found, samples


@pytest.mark.parametrize(
    ("attention", "samples"),
    [("sdpa", SINGLE), ("sdpa", RAGGED), ("eager", RAGGED)],
    ids=["single", "ragged", "eager"],
)
@pytest.mark.parametrize(
    "options", [{}, {"k": 0.1}, {"keep": 9, "merge": True}, {"k": 0.1, "policy": "pyramid"}], ids=str
)
# Reentrant checkpoints go back through the graph of features that the model encodes once for each layer, which torch
# refuses of the untrimmed model as well.
@pytest.mark.parametrize(("reentrant", "features"), [(False, "encoded"), (False, "given"), (True, "given")])
def test_checkpointed_layers_give_the_same_gradients(attention, samples, options, reentrant, features):
    model = tiny.build(attention=attention)
    compat.apply(model)
    batch = tiny.inputs(*samples)
    given = None
    if features == "given":
        with torch.no_grad():
            given = crosstrim.FeatureCache().features(model, batch).flatten(0, 1)
    model.train()
    expected = gradients(model, batch, options, given)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # As enable_input_require_grads, which would also ask for the vision tower's.
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    got = gradients(model, batch, options, given)
    assert torch.equal(got[0], expected[0])
    assert got[2] == expected[2]
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert given is None or expected[1]["features"].any()


def test_gradients_are_those_of_the_untrimmed_model_whose_later_layers_do_not_see_what_was_dropped(model):
    batch, trained = tiny.inputs(*RAGGED), model.train()
    loss, found, samples = gradients(trained, batch, {"keep": 9})
    dropped = torch.ones(2, tiny.FEATURES_PER_IMAGE, dtype=torch.bool)
    for sample, images in enumerate(samples):
        dropped[sample, list(images[0].kept_indices)] = False
    trained.zero_grad()
    with hidden_from(trained, tiny.CROSS_LAYERS[1:], 0, dropped):
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == tiny.IMAGE_TOKEN, -100)
        expected = trained(**batch, labels=labels).loss
        expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in trained.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)
