from __future__ import annotations

import socket

import pytest

from crosstrim import TrimConfig
from crosstrim.engines.sglang import launch
from crosstrim.engines.vllm import launch as vllm
from crosstrim.server import local


@pytest.fixture
def served(monkeypatch):
    """What would be served, and where."""
    seen = []

    def serve_here(settings, host, port, ready):
        seen.append((settings, host, port))
        ready(f"http://{host}:{port}/v1")

    monkeypatch.setattr(local, "serve_here", serve_here)
    return seen


def test_options_become_settings(run, served, monkeypatch):
    monkeypatch.setenv("CROSSTRIM_API_KEY", "secret older")
    arguments = ["--keep", 9, "--policy", "mean", "--max-batch", 3, "--queue-limit", 7, "--timeout", 2.5]
    arguments += ["--max-wait-ms", 1, "--max-image-bytes", 99, "--max-pixels", 77, "--feature-cache-mib", 2]
    arguments += ["--max-new-tokens", 5, "--allow-remote-images", "--model", "some/model", "--device", "cpu"]
    arguments += ["--log", "json", "--name", "llama3.2-vision"]
    arguments += ["--cors-origin", "https://app.example", "--cors-origin", "http://localhost:3000"]
    result = run("serve", *arguments, "--port", 1234, "--host", "::1", "--json")
    assert result.json == {"url": "http://::1:1234/v1", "model": "some/model"}
    ((settings, host, port),) = served
    assert (host, port) == ("::1", 1234)
    assert settings.trim == TrimConfig(keep=9, policy="mean")
    assert (settings.max_batch, settings.queue_limit, settings.timeout) == (3, 7, 2.5)
    assert (settings.max_wait_ms, settings.max_image_bytes, settings.max_pixels) == (1.0, 99, 77)
    assert (settings.feature_cache_bytes, settings.max_new_tokens) == (2 << 20, 5)
    assert (settings.allow_remote_images, settings.model, settings.device) == (True, "some/model", "cpu")
    assert (settings.api_keys, settings.log) == (("secret", "older"), "json")
    assert (settings.name, settings.cors_origins) == (
        "llama3.2-vision",
        ("https://app.example", "http://localhost:3000"),
    )
    assert "secret" not in repr(settings)


def test_an_origin_that_no_browser_sends_is_refused(run, served):
    result = run("serve", "--cors-origin", "app.example")
    assert result.code != 0
    assert "must be as browsers write it" in result.stderr
    assert served == []


def test_a_server_is_closed_to_the_web_unless_told(run, served):
    assert run("serve").stdout == "http://127.0.0.1:8000/v1\n"
    assert served[0][0].allow_remote_images is False


@pytest.mark.parametrize(("listens", "code"), [(True, 0), (False, 130)])
def test_a_server_that_is_told_to_stop_ends_well(run, monkeypatch, listens, code):
    def serve_here(settings, host, port, ready):
        if listens:
            ready("http://host/v1")
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "serve_here", serve_here)
    assert run("serve").code == code


@pytest.mark.parametrize(
    "wrong",
    [
        ("--engine", "spark"),
        ("--replicas", 2),
        ("--log", "xml"),
        ("--address", "a:1"),
        ("--api-key", " x"),
        ("--api-key", " "),
        ("--api-key", ""),
        ("--api-key", "a\tb"),
        ("--api-key", "é"),
    ],
)
def test_options_that_cannot_be(run, served, wrong):
    assert run("serve", *wrong).code == 2
    assert served == []


def test_sglang_gets_the_trim_and_its_own_options(run, monkeypatch):
    seen = []

    def serve_by_sglang(*arguments, **options):
        seen.append((arguments, options))
        raise SystemExit(0)  # the real one becomes SGLang's server

    monkeypatch.setattr(launch, "serve", serve_by_sglang)
    arguments = ["--engine", "sglang", "--keep", 0.5, "--port", 31000, "--device", "cpu", "--tensor-parallel", 2]
    run("serve", *arguments, "--", "--mem-fraction-static", "0.7")
    expected = {"device": "cpu", "host": "127.0.0.1", "port": 31000, "tensor_parallel": 2}
    expected |= {"allow_untested_backend": False}
    assert seen == [(("mini", TrimConfig(keep=0.5)), {**expected, "options": ["--mem-fraction-static", "0.7"]})]


def test_vllm_gets_the_trim_and_its_own_options(run, monkeypatch):
    seen = []

    def serve_by_vllm(*arguments, **options):
        seen.append((arguments, options))
        raise SystemExit(0)  # the real one becomes vLLM's server

    monkeypatch.setattr(vllm, "serve", serve_by_vllm)
    run("serve", "--engine", "vllm", "--keep", 0.5, "--port", 31000, "--", "--max-num-seqs", "8")
    expected = {"host": "127.0.0.1", "port": 31000, "tensor_parallel": 1, "options": ["--max-num-seqs", "8"]}
    assert seen == [(("mini", TrimConfig(keep=0.5)), expected)]


def test_a_device_does_not_go_with_vllm(run):
    result = run("serve", "--engine", "vllm", "--keep", 0.5, "--device", "cpu")
    assert result.code == 2
    assert "--device does not go with --engine vllm" in " ".join(result.stderr.replace("\u2502", " ").split())


def test_k_is_refused_with_vllm(run):
    result = run("serve", "--engine", "vllm", "--k", 0.5)
    assert (result.code, "give keep=" in " ".join(result.stderr.split())) == (2, True)


@pytest.mark.parametrize(
    ("given", "environment", "named"),
    [
        (["--api-key", "secret"], {}, "--api-key does not go with --engine sglang"),
        ([], {"CROSSTRIM_API_KEY": "secret"}, "CROSSTRIM_API_KEY does not go with --engine sglang"),
        (["--queue-limit", 8], {}, "--queue-limit does not go with --engine sglang"),
    ],
)
def test_limits_of_our_server_do_not_seem_to_limit_sglangs(run, monkeypatch, given, environment, named):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "serve", None)
    result = run("serve", "--engine", "sglang", *given)
    assert result.code == 2
    assert named in " ".join(result.stderr.replace("\u2502", " ").split())


def test_sglangs_options_go_with_sglang(run, served):
    assert run("serve", "--tensor-parallel", 2).code == 2
    assert run("serve", "--", "--tp-size", "2").code == 2
    assert run("serve", "--allow-untested-backend").code == 2
    assert served == []


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", port, "--model", "/no/such/model")
    assert result.code == 1
    assert f"127.0.0.1:{port} cannot be listened on" in result.stderr


def test_missing_fastapi_names_the_extra(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run("serve", "--port", 0)
    assert (result.code, "pip install 'crosstrim[serve]'" in result.stderr) == (1, True)
