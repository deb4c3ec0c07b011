"""A model spread over devices answers and keeps what it does on one."""

from __future__ import annotations

import accelerate
import pytest
import torch

import crosstrim
from crosstrim.models import compat
from tests.support import devices, tiny
from tests.support.passes import split_turns
from tests.support.tiny import Image

# Which of eight decoder layers are on the second device; 1, 3 and 6 are cross-attention layers.
SPREADS = {"halves": {4, 5, 6, 7}, "leader elsewhere": {1, 2, 6}}
SETTINGS = [
    {},
    {"k": 0.1},
    {"keep": 0.3},
    {"keep": 9, "policy": "mmr"},
    {"k": 0.1, "policy": "pyramid"},
    {"k": 0.1, "trim_first_layer": False},
    {"k": 0.1, "rating_rows": "last_turn"},
    {"k": 0.1, "kv_dtype": "int8"},
]


def spread(model, on_second):
    text = model.model.language_model
    ends = [model.model.vision_model, model.model.multi_modal_projector, text.embed_tokens, text.rotary_emb]
    for module in [*ends, text.norm, model.lm_head]:
        devices.place(module, devices.FIRST)
    for index, layer in enumerate(text.layers):
        devices.place(layer, devices.SECOND if index in on_second else devices.FIRST)


@pytest.fixture(params=SPREADS)
def spread_model(request):
    model = tiny.build()
    compat.apply(model)
    spread(model, SPREADS[request.param])
    return model


@pytest.fixture
def whole():
    model = tiny.build()
    compat.apply(model)
    return model


def moved(inputs):
    return {name: devices.Elsewhere(tensor, devices.FIRST) for name, tensor in inputs.items()}


def outcome(model, inputs, options, **generation):
    with crosstrim.trim(model, **options) as trimmed:
        output = model.generate(**inputs, max_new_tokens=3, **generation)
        report = trimmed.report()
    kept = [[image.kept_indices for image in sample] for sample in report.samples]
    return output.tolist(), kept, report.kv_bytes


def test_devices_that_are_not_there_refuse_to_mix():
    one = devices.Elsewhere(torch.ones(3), devices.FIRST)
    with devices.pretended():
        assert (one + torch.ones(3, device=devices.FIRST)).device == devices.FIRST
        assert (one + one.sum().cpu()).tolist() == [4, 4, 4]
        assert one[torch.tensor([0, 2])].device == devices.FIRST
        for other in (
            torch.ones(3),
            torch.ones(3, device=devices.SECOND),
            torch.tensor([1.0], device=devices.SECOND),
        ):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                one + other
        assert torch.equal(
            one.to(devices.SECOND) + torch.ones(3, device=devices.SECOND).to("cpu").to(devices.SECOND),
            torch.full((3,), 2.0, device=devices.SECOND),
        )


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_generation(spread_model, whole, options):
    inputs = tiny.inputs([3, Image(2, seed=1), 6], [Image(4, seed=2), 4])
    with devices.pretended():
        found = outcome(spread_model, moved(inputs), options)
    assert found == outcome(whole, inputs, options)


def test_without_a_cache(spread_model, whole):
    inputs = tiny.inputs([3, Image(2, seed=1), 6])
    with devices.pretended():
        found = outcome(spread_model, moved(inputs), {"k": 0.1}, use_cache=False)
    assert found == outcome(whole, inputs, {"k": 0.1}, use_cache=False)


def test_a_static_cache(spread_model, whole, monkeypatch):
    monkeypatch.setattr(
        type(whole), "_valid_auto_compile_criteria", lambda *_args: False
    )  # eager, which may be spread
    inputs = tiny.inputs([3, Image(2, seed=1), 6], [Image(4, seed=2), 4])
    with devices.pretended():
        found = outcome(spread_model, moved(inputs), {"k": 0.1}, cache_implementation="static")
    assert found == outcome(whole, inputs, {"k": 0.1}, cache_implementation="static")


def test_beams(spread_model, whole):
    inputs = tiny.inputs([3, Image(2, seed=1), 6])
    with devices.pretended():
        found = outcome(spread_model, moved(inputs), {"k": 0.1}, num_beams=2)
    assert found == outcome(whole, inputs, {"k": 0.1}, num_beams=2)


def test_layers_on_the_disk(checkpoint, whole):
    """Loaded as `device_map="auto"` would when memory is short: accelerate brings each layer in when it runs."""
    places = dict.fromkeys(["model.vision_model", "model.multi_modal_projector", "lm_head"], "cpu")
    places |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "rotary_emb", "norm")}
    places |= {f"model.language_model.layers.{index}": "disk" if index > 0 else "cpu" for index in range(8)}
    model, _ = crosstrim.load(checkpoint, device_map=places)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, tiny.PAD
    inputs = tiny.inputs([3, Image(2, seed=1), 6], [Image(4, seed=2), 4])
    assert outcome(model, inputs, {"k": 0.1}) == outcome(whole, inputs, {"k": 0.1})


def appended(model, inputs, **options):
    """The best tokens after a second image that comes in a pass of its own."""
    first, second = split_turns(inputs, 9)
    with crosstrim.trim(model, **options) as trimmed, torch.no_grad():
        cache = model(**first).past_key_values
        best = model(**second, past_key_values=cache).logits.argmax(-1)
        return best.tolist(), [[image.kept_indices for image in sample] for sample in trimmed.report().samples]


@pytest.mark.parametrize("options", [{}, {"k": 0.1}, {"k": 0.1, "trim_first_layer": False}], ids=str)
def test_an_appended_image(spread_model, whole, options):
    inputs = tiny.inputs([3, Image(2, seed=1), 4, Image(3, seed=2), 5])
    with devices.pretended():
        found = appended(spread_model, moved(inputs), **options)
    assert found == appended(whole, inputs, **options)


@pytest.mark.parametrize("options", [{}, {"k": 0.1}], ids=str)
@pytest.mark.filterwarnings("ignore::crosstrim.errors.CompatWarning")
def test_an_unrepaired_model(options):
    inputs = tiny.inputs([3, Image(2, seed=1), 6], [Image(4, seed=2), 4])
    expected = outcome(tiny.build(), inputs, options)
    model = tiny.build()
    spread(model, SPREADS["leader elsewhere"])
    with devices.pretended():
        assert outcome(model, moved(inputs), options) == expected


def test_the_report_of_an_offloaded_leader_names_where_it_computes():
    model = tiny.build()
    compat.apply(model)
    leader = model.model.language_model.layers[tiny.CROSS_LAYERS[0]]
    accelerate.cpu_offload(leader, execution_device=torch.device("cpu"))
    assert next(leader.parameters()).device.type == "meta"
    with torch.no_grad(), crosstrim.trim(model, k=0.1) as trimmed:
        model(**tiny.inputs([2, Image(4), 9]))
        assert trimmed.report().versions["device"] == "cpu"
