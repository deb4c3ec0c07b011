"""Loading: what works, what cannot be, and the Hub, to which nothing here goes."""

from __future__ import annotations

import shutil
import socket
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from transformers import MllamaForConditionalGeneration, MllamaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

import crosstrim
from crosstrim import mini
from crosstrim.asking import loading
from crosstrim.errors import ConfigError, LoadError, MissingExtraError, UnsupportedModelError
from crosstrim.models import compat
from tests.support import tiny, tiny_checkpoint
from tests.support.loading import refused


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
