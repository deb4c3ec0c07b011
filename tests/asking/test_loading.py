"""Loading: what works, and every refusal by its words. Nothing here goes online."""

from __future__ import annotations

import json
import shutil
import socket
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration, MllamaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

import crosstrim
from crosstrim import mini
from crosstrim.asking import loading
from crosstrim.errors import ConfigError, LoadError, MissingExtraError, UnsupportedModelError
from crosstrim.models import compat
from tests.support import tiny, tiny_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def refused(error, *args, **options) -> str:
    with pytest.raises(error) as caught:
        crosstrim.load(*args, **options)
    return str(caught.value)


def test_model_and_processor_are_ready_and_repaired(checkpoint):
    model, processor = crosstrim.load(checkpoint)
    assert isinstance(model, MllamaForConditionalGeneration)
    assert not model.training
    assert not any(finding.open for finding in compat.check(model))
    assert isinstance(processor.image_processor, MllamaImageProcessorPil)


def test_weights_are_those_that_were_saved(checkpoint):
    model, _ = crosstrim.load(str(checkpoint))
    loaded = model.state_dict()
    for name, weight in tiny.build().state_dict().items():
        assert torch.equal(loaded[name], weight)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16", "float32", "auto", None])
def test_dtype(checkpoint, dtype):
    model, _ = crosstrim.load(checkpoint, dtype=dtype)
    expected = torch.float32 if dtype in (None, "auto") else getattr(torch, str(dtype).removeprefix("torch."))
    assert model.dtype == expected


def test_the_mini_runs_in_float32_however_it_is_stored(checkpoint, tmp_path, monkeypatch):
    stored = tmp_path / "mini"
    shutil.copytree(checkpoint, stored)
    model, _ = crosstrim.load(checkpoint, dtype="bfloat16")
    model.save_pretrained(stored)
    monkeypatch.setattr(mini, "path", lambda: stored)
    assert crosstrim.load("mini")[0].dtype == torch.float32
    assert crosstrim.load("mini", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert crosstrim.load(stored)[0].dtype == torch.bfloat16


def test_attention_implementation_is_passed_on(checkpoint):
    assert crosstrim.load(checkpoint, attn_implementation="eager")[0].config._attn_implementation == "eager"


def test_cpu_by_name_is_the_default(checkpoint):
    assert crosstrim.load(checkpoint, device_map="cpu")[0].device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"dtype": "int8"},
            ConfigError,
            "dtype='int8' cannot be loaded; choose one of auto, bfloat16, float16, float32",
        ),
        ({"dtype": torch.int8}, ConfigError, "dtype='int8' cannot be loaded"),
        ({"dtype": "float12"}, ConfigError, "dtype='float12' cannot be loaded"),
        ({"device_map": "warp"}, ConfigError, "'warp' is no device; give one such as 'cpu' or 'cuda:0'"),
        ({"device_map": "cuda:99"}, ConfigError, "the device 'cuda:99' is not there: torch sees"),
        ({"device_map": 99}, ConfigError, "is not there: torch sees"),
    ],
)
def test_options_that_cannot_be(checkpoint, options, error, words):
    assert words in refused(error, checkpoint, **options)


def test_spreading_over_devices_works_with_accelerate(checkpoint):
    model, _ = crosstrim.load(checkpoint, device_map="auto")
    assert not any(finding.open for finding in compat.check(model))


def test_pictures_are_prepared_by_pillow_also_beside_torchvision(checkpoint, monkeypatch):
    class Torchvision:
        pass

    processor = tiny_checkpoint.processor()
    expected = processor.image_processor.to_dict()
    processor.image_processor = Torchvision()
    monkeypatch.setattr(MllamaProcessor, "from_pretrained", lambda *_args, **_options: processor)
    prepared = crosstrim.load(checkpoint)[1].image_processor
    assert isinstance(prepared, MllamaImageProcessorPil)
    assert prepared.to_dict() == expected


def test_spreading_over_devices_needs_accelerate(checkpoint, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    words = refused(MissingExtraError, checkpoint, device_map="auto")
    assert words == "the device map 'auto' needs accelerate, which is not installed: pip install accelerate."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./missing", "'./missing' is neither 'mini' nor a folder here; check the path."),
        ("/a/b/missing", "'/a/b/missing' is neither 'mini' nor a folder here; check the path."),
        ("missing", "'missing' is neither 'mini' nor a folder here, and the Hub cannot be asked (no connection"),
        ("owner/missing", "go online once to download it, or give the folder of a copy."),
        ("not a name", "'not a name' is neither 'mini' nor a folder here, and cannot be a Hub id (owner/name)."),
    ],
)
def test_a_model_that_is_not_there(name, words):
    assert words in refused(LoadError, name)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "GatedRepoError",
            "o/m is gated: accept its licence at https://huggingface.co/o/m, then run `hf auth login`.",
        ),
        ("RepositoryNotFoundError", "nor a repository on the Hub; if it is private, run `hf auth login`."),
        ("RevisionNotFoundError", "o/m has no revision 'v9' on the Hub."),
        ("EntryNotFoundError", "o/m on the Hub holds no config.json; it is no transformers model."),
        ("HfHubHTTPError", "o/m could not be downloaded: HfHubHTTPError: said the Hub"),
        ("OfflineModeIsEnabled", "the Hub cannot be asked"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, words):
    kind = getattr(hub_errors, error)
    response = SimpleNamespace(headers={}, request=None)
    options = {"response": response} if issubclass(kind, hub_errors.HfHubHTTPError) else {}

    def refuse(*_args, **_options):
        raise kind("said the Hub", **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert words in refused(LoadError, "o/m", revision="v9")


@pytest.fixture
def no_connection(monkeypatch):
    """A Hub at an address where nobody listens, and a cache with nothing in it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    huggingface_hub.close_session()  # which knows whether it is offline
    yield endpoint
    huggingface_hub.close_session()


def test_without_a_connection_one_attempt_is_enough(no_connection, capfd, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited to try again"))
    verbosity = huggingface_hub.logging.get_verbosity()
    assert "the Hub cannot be asked (no connection" in refused(LoadError, "owner/missing")
    assert huggingface_hub.logging.get_verbosity() == verbosity
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_is_slow_is_asked_again(no_connection, monkeypatch):
    class TimeoutException(Exception):
        """Of the HTTP library."""

    def late(*_args, **_options):
        raise TimeoutException

    def refuse(*_args, **_options):
        raise hub_errors.EntryNotFoundError("said the Hub")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", late)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert "on the Hub holds no config.json" in refused(LoadError, "owner/missing")


def test_from_the_hub_comes_the_config_first_and_never_a_pickle(checkpoint, monkeypatch):
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options["revision"]))
        return str(checkpoint / file)

    def snapshot(name, allow_patterns, **options):
        asked.append((name, allow_patterns, options["revision"]))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    crosstrim.load("owner/name", revision="v1")
    assert asked == [
        ("owner/name", "config.json", "v1"),
        ("owner/name", ["*.json", "*.jinja", "*.safetensors", "tokenizer*"], "v1"),
    ]


def test_another_architecture_is_never_downloaded(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_args, **_options: str(tmp_path / "config.json"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_options: pytest.fail("downloaded"))
    assert "owner/text is LlamaForCausalLM with model_type 'llama'" in refused(UnsupportedModelError, "owner/text")


def test_a_cached_hub_model_loads_offline(checkpoint, tmp_path, monkeypatch):
    repository = tmp_path / "models--owner--name"
    shutil.copytree(checkpoint, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for module in (huggingface_hub.constants, huggingface_hub.file_download, huggingface_hub._snapshot_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    model, _ = crosstrim.load("owner/name")
    assert model.dtype == torch.float32


def test_a_file_is_no_folder(checkpoint):
    assert "is a file; give the folder that holds" in refused(LoadError, checkpoint / WEIGHTS)


def test_an_empty_folder(tmp_path):
    assert "holds no config.json; give a folder written by save_pretrained" in refused(LoadError, tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            '{"base_model_name_or_path": "meta-llama/Llama-3.2-11B-Vision-Instruct", "peft_type": "LORA"}',
            "an adapter of meta-llama/Llama-3.2-11B-Vision-Instruct, and no model; load the base by model, "
            "processor = crosstrim.load('meta-llama/Llama-3.2-11B-Vision-Instruct'), put",
        ),
        ('{"peft_type": "LORA"}', "an adapter whose adapter_config.json names no base model, and no model; load the"),
        ("[]", "crosstrim.load(the model it was trained on)"),
        ("{", "names no base model"),
    ],
)
def test_an_adapter_says_what_to_load(tmp_path, config, words):
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    message = refused(LoadError, tmp_path)
    assert words in message
    assert f"model = peft.PeftModel.from_pretrained(model, {str(tmp_path)!r})" in message
    assert message.endswith("then trim that by crosstrim.trim(model).")


def test_the_mini_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(mini, "path", lambda: tmp_path)
    assert "the embedded model is missing from this installation" in refused(LoadError)


def test_a_pickle_is_never_opened(copy):
    (copy / WEIGHTS).unlink()
    (copy / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "holds no *.safetensors (only pytorch_model.bin, a pickle, which could run code" in refused(
        LoadError, copy
    )
    (copy / "pytorch_model.bin").unlink()
    assert "holds no *.safetensors (no weights)" in refused(LoadError, copy)


def damage_cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def damage_garbage(folder):
    (folder / WEIGHTS).write_bytes(b"garbage" * 99)


def damage_lacking(folder):
    weights = load_file(folder / WEIGHTS)
    weights.pop("multi_modal_projector.bias")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def damage_shape(folder):
    weights = load_file(folder / WEIGHTS)
    weights["multi_modal_projector.bias"] = torch.zeros(3)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def damage_shard(folder):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    index["weight_map"]["multi_modal_projector.bias"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def damage_processor(folder):
    (folder / "processor_config.json").unlink()


def damage_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def damage_auto_map(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of the repository was run')")


DAMAGES = [
    (damage_cut, "the weights of {} could not be loaded (SafetensorError: "),
    (damage_garbage, "the weights of {} could not be loaded (SafetensorError: "),
    (damage_lacking, "{} lacks 1 of the model's weights, such as model.multi_modal_projector.bias; download"),
    (
        damage_shape,
        "{} has a weight model.multi_modal_projector.bias of shape (3,) where its config.json asks for (64,)",
    ),
    (damage_shard, "the weights of {} could not be loaded ("),
    (damage_tokenizer, "the processor of {} could not be loaded ("),
    (damage_processor, "the processor of {} could not be loaded ("),
    (damage_json, "{}/config.json is not valid JSON ("),
    (damage_auto_map, "{} asks to run code of its own (auto_map in config.json), which crosstrim never does."),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=lambda case: getattr(case, "__name__", ""))
def test_damage_is_told_and_leaves_nothing_behind(copy, monkeypatch, damage, words):
    monkeypatch.setattr(compat, "apply", lambda *_: pytest.fail("a hook was put on before everything was loaded"))
    damage(copy)
    before = sorted(copy.iterdir())
    message = refused(LoadError, copy)
    assert message.startswith(words.format(copy))
    assert "\n" not in message
    assert sorted(copy.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_implementation": "flash_attention_2"}, "Flash Attention 2"),
        ({"attn_implementation": "foo"}, 'attn_implementation="foo"'),
        ({"quantization_config": {"quant_method": "foo"}}, "foo"),
    ],
)
def test_what_transformers_refuses_is_not_blamed_on_the_weights(checkpoint, options, words):
    message = refused(LoadError, checkpoint, **options)
    ((name, value),) = options.items()
    assert message.startswith(f"{checkpoint} could not be loaded (")
    assert words in message
    assert message.endswith(f"try it without {name}={value!r}.")
    assert "download" not in message


def test_what_transformers_cannot_do_without_any_option(checkpoint, monkeypatch):
    def fail(*_args, **_options):
        raise AttributeError("no such thing")

    monkeypatch.setattr(MllamaForConditionalGeneration, "from_pretrained", fail)
    assert refused(LoadError, checkpoint) == (
        f"{checkpoint} could not be loaded (AttributeError: no such thing); try another version of transformers."
    )


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "mllama_text_model", "architectures": ["MllamaForCausalLM"]},
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
        {"architectures": ["Something"]},
        {},
        [],
    ],
)
def test_another_architecture_is_refused_before_its_weights_are_read(copy, monkeypatch, config):
    (copy / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(MllamaForConditionalGeneration, "from_pretrained", lambda *_: pytest.fail("read"))
    words = refused(UnsupportedModelError, copy)
    assert "with model_type" in words
    assert "crosstrim loads Llama-3.2-Vision (model_type 'mllama')" in words
