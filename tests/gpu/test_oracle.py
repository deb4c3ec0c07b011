"""On a GPU a trimmed model answers as the masked untrimmed one, and keeps what loops over its own queries keep."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import crosstrim
from crosstrim.method.policies import POLICIES
from crosstrim.models import vision
from tests.support import oracle, tiny
from tests.support.gpu import DEVICE, REHEARSAL, on_device, run
from tests.support.tiny import Image

SAMPLES = {
    "single": [[2, Image(4), 9]],
    "ragged": [[2, Image(4), 9], [1, Image(1, seed=1), 4]],
    "two pictures": [[1, Image(4), 5, Image(2, seed=1), 7]],
}
OPTIONS = [{"k": 0.1}, {"keep": 7, "policy": "union"}, {"keep": 0.3, "policy": "union", "trim_first_layer": False}]


def kept_mask(report, batch):
    features = tiny.FEATURES_PER_IMAGE * batch["cross_attention_mask"].shape[2]
    kept = torch.zeros(len(report.samples), features, dtype=torch.bool, device=DEVICE)
    for sample, images in enumerate(report.samples):
        for image in images:
            kept[sample, list(image.kept_indices)] = True
    return kept


def seen_by_the_leader(model):
    """The first queries and keys that the first cross-attention layer makes."""
    seen, leader = {}, model.model.language_model.layers[tiny.CROSS_LAYERS[0]].cross_attn

    def see(name):
        def hook(module, args, output):
            seen.setdefault(name, output.detach().cpu())

        return hook

    for name in ("q_norm", "k_norm"):
        getattr(leader, name).register_forward_hook(see(name))
    return seen, leader.scaling


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_oracle(model, dtype, samples, options, attention):
    model.set_attn_implementation(attention)
    batch = on_device(tiny.inputs(*samples), dtype)
    seen, scale = seen_by_the_leader(model)
    with crosstrim.trim(model, **options) as trimmed:
        out, report = run(model, batch), trimmed.report()
    kept = kept_mask(report, batch)
    knobs = {name: options[name] for name in ("k", "keep") if name in options}
    on_cpu = {name: tensor.cpu() for name, tensor in batch.items()}
    visible = oracle.feature_visibility(on_cpu)
    rating = on_cpu["attention_mask"].bool()
    saliency = oracle.saliency_by_loops(seen["q_norm"], seen["k_norm"], visible, rating, scale)
    expected = oracle.kept_by_loops(saliency, visible.any(1), size=tiny.FEATURES_PER_IMAGE, **knobs)
    assert torch.equal(kept.cpu(), expected)
    start = batch["input_ids"].shape[1] - 1
    tokens = out.sequences[:, start + 1 :]
    whole = options.get("trim_first_layer", True)
    wanted = oracle.masked_logits(model, batch, kept, tokens[:, :-1], trim_first_layer=whole)[:, start:]
    got = torch.stack(out.logits, 1)
    if dtype == torch.float32:
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    else:
        assert (got.float() - wanted.float()).abs().max() < 0.1 * wanted.float().std()


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("knob", [{"keep": 9}, {"k": 0.1}], ids=str)
def test_policies_choose_as_on_a_cpu(name, knob):
    """On the same evidence: the layer's own numbers differ in their last bits from device to device."""
    generator = torch.Generator().manual_seed(2)
    parts = {
        "saliency": torch.rand(2, 8, 1300, generator=generator),
        "visible": torch.rand(2, 1300, generator=generator) < 0.9,
        "keys": torch.randn(2, 4, 1300, 32, generator=generator),
        "values": torch.randn(2, 4, 1300, 32, generator=generator),
        "budget": torch.tensor([[90], [70]]),
    }
    policy, kept = crosstrim.policies.voter(name), []
    for device in ("cpu", DEVICE):
        moved = {key: tensor.to(device) for key, tensor in parts.items()}
        evidence = crosstrim.policies.Evidence(**moved, features_per_image=1300, features_per_tile=65)
        kept.append(crosstrim.select(policy(evidence), moved["visible"], features_per_image=1300, **knob).cpu())
    assert (kept[0] != kept[1]).sum() <= (4 if name in ("contribution", "dpp", "mmr") else 0)
    assert torch.equal(kept[0].sum(), kept[1].sum()) or "k" in knob


@pytest.mark.skipif(REHEARSAL, reason="flash attention is a GPU's")
@pytest.mark.parametrize("options", [{}, {"k": 0.1}, {"keep": 7}], ids=str)
def test_one_picture_runs_on_flash_attention_alone(options):
    """No attention of prompt or decoding takes a mask then, or the kernel that is forced would refuse it."""
    model = tiny.build(dtype=torch.bfloat16).to(DEVICE)
    crosstrim.compat.apply(model)
    batch = on_device(tiny.inputs([2, Image(4), 9]), torch.bfloat16)
    features = crosstrim.FeatureCache().features(model, batch)
    with crosstrim.trim(model, **options), vision.given(model, features):
        expected = run(model, batch)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            got = run(model, batch)
    difference = (torch.stack(got.logits).float() - torch.stack(expected.logits).float()).abs().max()
    assert difference < 0.1 * torch.stack(expected.logits).float().std()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_eight_bits(model, dtype, kv_dtype):
    batch = on_device(tiny.inputs(*SAMPLES["ragged"]), dtype)
    with crosstrim.trim(model, keep=9):
        expected = run(model, batch)
    with crosstrim.trim(model, keep=9, kv_dtype=kv_dtype) as trimmed:
        got = run(model, batch)
        assert trimmed.report().kv_bytes < trimmed.report().kv_bytes_untrimmed
    first = slice(0, 1)  # before anything is read rounded
    torch.testing.assert_close(torch.stack(got.logits)[first], torch.stack(expected.logits)[first])


@pytest.mark.skipif(REHEARSAL, reason="nothing is moved on a CPU")
def test_an_offloaded_cache(model, dtype):
    batch = on_device(tiny.inputs(*SAMPLES["ragged"]), dtype)
    with crosstrim.trim(model, k=0.1):
        plain = run(model, batch)
        offloaded = run(model, batch, cache_implementation="offloaded")
    assert torch.equal(offloaded.sequences, plain.sequences)
    assert torch.equal(torch.stack(offloaded.logits), torch.stack(plain.logits))
