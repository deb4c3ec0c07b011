"""Loading weights in four or eight bits, and checkpoints that were saved so."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BitsAndBytesConfig

import crosstrim
from crosstrim import mini
from crosstrim.asking import answering, images, loading
from crosstrim.errors import ConfigError, MissingExtraError
from crosstrim.models import quantised
from tests.support import tiny, tiny_checkpoint
from tests.support.loading import refused

MISSING = "which is not installed: pip install 'crosstrim[quant]'."


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("name", "library"), [("nf4", "bitsandbytes"), ("int8", "torchao"), ("fp8", "torchao")], ids=str
)
def test_a_library_that_is_missing_is_named(nothing_installed, name, library):
    assert refused(MissingExtraError, "o/m", quantization=name) == (
        f"quantization={name!r} needs {library}, {MISSING}"
    )


def test_a_format_that_is_none_is_refused_before_anything_is_looked_for():
    words = refused(ConfigError, "o/m", quantization="int4")
    assert words == "quantization='int4' must be one of nf4, int8, fp8."


def save(folder, **facts):
    """A folder whose config.json says that the weights were saved quantised."""
    tiny_checkpoint.processor().save_pretrained(folder)
    tiny.build().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": facts}))
    return folder


HUB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_a_saved_format_whose_library_is_missing_is_named(tmp_path, nothing_installed):
    words = refused(MissingExtraError, save(tmp_path, **HUB))
    assert words == f"{tmp_path}, which was saved quantised (nf4), needs bitsandbytes, {MISSING}"


def test_weights_are_quantised_once(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: True)
    words = refused(ConfigError, save(tmp_path, **HUB), quantization="int8")
    assert words == f"{tmp_path} was saved quantised (nf4); leave quantization='int8' out."


def test_processes_share_whole_weights_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: True)
    words = "tp=2 divides weights that are not quantised; leave the quantization out, or tp."
    assert refused(ConfigError, save(tmp_path, **HUB), tp=2) == words


bitsandbytes = pytest.mark.skipif(not quantised.versions().get("bitsandbytes"), reason="needs bitsandbytes")
torchao = pytest.mark.skipif(not quantised.versions().get("torchao"), reason="needs torchao")


@bitsandbytes
def test_processes_share_no_weights_that_are_to_be_quantised(checkpoint):
    assert "tp=2 divides weights that are not quantised" in refused(ConfigError, checkpoint, tp=2, quantization="nf4")


@bitsandbytes
def test_one_way_to_say_it(checkpoint):
    config = BitsAndBytesConfig(load_in_4bit=True)
    words = refused(ConfigError, checkpoint, quantization="nf4", quantization_config=config)
    assert words == "quantization='nf4' and quantization_config say the same thing; give one of them."


@bitsandbytes
@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"model": "disk", "lm_head": "cpu"}, "cpu and disk"),
        ({"model": 0, "lm_head": "cpu"}, "cpu and cuda"),
        ({"": "disk"}, "disk"),
    ],
    ids=str,
)
def test_quantised_weights_are_not_fetched_from_elsewhere(checkpoint, places, words):
    found = refused(ConfigError, checkpoint, quantization="nf4", device_map=places)
    assert found.startswith(f"quantised weights would be on {words}; they must all be on GPUs, or all on the CPU")


@torchao
@pytest.mark.parametrize("places", [None, "cpu", {"": "cpu"}, "auto"], ids=str)
def test_where_quantised_weights_may_be(checkpoint, places, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, _ = crosstrim.load(checkpoint, quantization="int8", device_map=places)
    assert quantised.name_of(model.config) == "int8"
    assert {one.device.type for one in model.parameters()} == {"cpu"}


@bitsandbytes
def test_what_is_computed_is_of_the_dtype_that_is_asked_for(checkpoint):
    model, _ = crosstrim.load(checkpoint, quantization="nf4", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16
    with torch.no_grad():
        assert model(**tiny.inputs([2, tiny.Image(2), 3])).logits.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def saved_mini(tmp_path_factory):
    """mini in four bits, saved as such checkpoints are on the Hub, and the model that was saved."""
    folder = tmp_path_factory.mktemp("mini")
    model, processor = crosstrim.load("mini", quantization="nf4")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@bitsandbytes
def test_mini_saved_in_four_bits_answers_alike(saved_mini):
    folder, model, processor = saved_mini
    assert [file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt")] == [
        "model.safetensors"
    ]
    whole = mini.path() / "model.safetensors"
    assert (folder / "model.safetensors").stat().st_size < whole.stat().st_size
    again, _ = crosstrim.load(folder)
    assert quantised.name_of(again.config) == quantised.name_of(model.config) == "nf4"
    shown = mini.examples()[0]
    picture = images.open_image(images.find(shown["image"]))
    for asked in shown["questions"]:
        found = [
            answering.ask(one, processor, picture, asked["question"], crosstrim.TrimConfig(keep=0.5))
            for one in (model, again)
        ]
        assert found[0].answer == found[1].answer == asked["answers"][0]
        assert found[0].report.samples == found[1].report.samples


@bitsandbytes
def test_a_checkpoint_with_everything_quantised_loads(checkpoint, tmp_path):
    """As on the Hub: whoever saved it left nothing but the head whole, the layer that scores included."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model, processor = crosstrim.load(checkpoint, quantization_config=config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = crosstrim.load(tmp_path)
    batch = tiny.inputs([2, tiny.Image(4), 9])
    with torch.no_grad(), crosstrim.trim(model, k=0.1) as one, crosstrim.trim(again, k=0.1) as other:
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    assert one.report().samples == other.report().samples


@torchao
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_checkpoint_of_torchao_loads(checkpoint, tmp_path, name):
    model, processor = crosstrim.load(checkpoint, quantization=name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = crosstrim.load(tmp_path)
    assert quantised.name_of(again.config) == name
    batch = tiny.inputs([2, tiny.Image(4), 9])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_a_configuration_needs_no_weights(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    assert loading.read_config(tmp_path).text_config.hidden_size == 64
    assert "holds no *.safetensors" in refused(crosstrim.errors.LoadError, tmp_path)
