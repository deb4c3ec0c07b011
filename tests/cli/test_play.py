from __future__ import annotations

import socket
import sys

import pytest

from crosstrim import addresses
from crosstrim.play import serving


@pytest.fixture
def served(monkeypatch):
    """What would be served, and where."""
    seen = []

    def serve(model, *, ready, **options):
        seen.append((model, options))
        ready(addresses.url(options["host"], options["port"]))

    monkeypatch.setattr(serving, "serve", serve)
    return seen


def test_it_is_on_loopback_unless_told(run, served):
    assert run("play").stdout == "http://127.0.0.1:7860/\n"
    ((model, options),) = served
    assert (model, options["host"], options["port"], options["max_new_tokens"]) == ("mini", "127.0.0.1", 7860, 64)


def test_options_are_handed_on_and_the_url_is_told_as_json(run, served):
    arguments = ["--host", "::1", "--port", 1234, "--model", "some/model", "--device", "cpu", "--dtype", "float16"]
    result = run("play", *arguments, "--max-new-tokens", 9, "--quantize", "nf4", "--json")
    assert result.json == {"url": "http://[::1]:1234/", "model": "some/model"}
    how = {"device": "cpu", "dtype": "float16", "quantization": "nf4"}
    assert served == [("some/model", {"host": "::1", "port": 1234, "max_new_tokens": 9, **how})]


def test_there_is_no_tunnel(run, served):
    assert run("play", "--share").code == 2
    assert served == []


def test_an_interrupt_ends_with_130(run, monkeypatch):
    def serve(model, *, ready, **options):
        ready("http://host/")
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "serve", serve)
    assert run("play").code == 130


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(serving, "_check_installed", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("play", "--port", port, "--model", "/no/such/model")
    assert (result.code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert f"127.0.0.1:{port} cannot be listened on" in result.stderr
    assert "choose another --host or --port" in result.stderr


def test_without_gradio_one_line_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run("play", "--model", "/no/such/model")
    assert (result.code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "gradio, which is not installed: pip install 'crosstrim[play]'" in result.stderr
