"""What the plugin for vLLM says without vLLM."""

from __future__ import annotations

import itertools
import json
import sys

import pytest

from crosstrim import TrimConfig, capacity, mini
from crosstrim.engines import process
from crosstrim.engines.vllm import launch
from crosstrim.errors import ConfigError, MissingExtraError
from crosstrim.memory import SHAPES


def test_the_command():
    config, options = TrimConfig(keep=0.5, policy="union"), ["--max-num-seqs", "8"]
    arguments, environment = launch.command("mini", config, port=1234, tensor_parallel=2, options=options)
    assert arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert arguments[-2:] == ["--max-num-seqs", "8"]
    given = dict(itertools.pairwise(arguments))
    assert (given["--model"], given["--served-model-name"]) == (str(mini.path()), "mini")
    assert (given["--port"], given["--tensor-parallel-size"], given["--dtype"]) == ("1234", "2", "float32")
    assert json.loads(given["--hf-overrides"]) == {"crosstrim": {"version": 1, "keep": 0.5, "policy": "union"}}
    assert environment == {"VLLM_USE_V2_MODEL_RUNNER": "0"}


@pytest.mark.parametrize("options", [{"k": 0.5}, {"policy": "mass:0.9"}], ids=str)
def test_what_only_the_prompt_decides_is_refused_before_anything_starts(options):
    with pytest.raises(ConfigError, match=r"lets the prompt decide .* vLLM .* give keep=, such as keep=0\.5"):
        launch.command("mini", TrimConfig(**options))


def test_the_command_is_printed_and_becomes_the_process(monkeypatch, capsys):
    became = []
    monkeypatch.setattr(process, "find_spec", lambda name: name == "vllm")
    monkeypatch.setattr(process.os, "execve", lambda *arguments: became.append(arguments))
    launch.serve("mini", TrimConfig(keep=0.5))
    ((path, _, environment),) = became
    assert (path, environment["VLLM_USE_V2_MODEL_RUNNER"]) == (sys.executable, "0")
    printed = capsys.readouterr().err
    assert printed.startswith(f"VLLM_USE_V2_MODEL_RUNNER=0 {sys.executable} -m vllm.entrypoints.openai.api_server")
    assert '\'{"crosstrim": {"version": 1, "keep": 0.5' in printed


def test_vllm_may_be_missing(monkeypatch):
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"vLLM is not installed in this Python; docs/vllm\.md"):
        launch.serve("mini", TrimConfig())


def test_blocks_are_given_whole():
    shape = SHAPES["11b"]
    by_hand = (401 * 16 * 8 + 512 * 32) * 4096  # 6404 features fill 401 blocks of 16
    assert capacity.request_kv_bytes(shape, 6404, 512, block=16) == by_hand
