"""Exit codes: 2 where the command line itself is wrong, 1 where a file, a model or data is."""

from __future__ import annotations

import pytest

ASK = ["ask", "example", "what?"]
BATCH = ["batch", "missing.jsonl", "out.jsonl"]
SGLANG = ["serve", "--engine", "sglang"]
SWEEP = ["eval", "--out", "run.json"]


@pytest.mark.parametrize(
    "arguments",
    [
        *([*verb, *wrong] for verb in (ASK, ["eval"], SWEEP, BATCH, ["serve"], SGLANG) for wrong in (
            ["--k", "2"],
            ["--k", "abc"],
            ["--keep", "0"],
            ["--keep", "1.5"],
            ["--keep", "half"],
            ["--keep", "0.5", "--policy", "onion"],
            ["--keep", "0.5", "--policy", "mass:2"],
            ["--keep", "0.5", "--rating-rows", "some"],
            ["--k", "0.5", "--k-base", "some"],
            ["--kv-dtype", "int4"],
        )),
        *([*verb, "--k", "0.5", "--keep", "0.5"] for verb in (ASK, ["eval"], BATCH, ["serve"], SGLANG)),
        *([*verb, *wrong] for verb in (ASK, ["eval", "--quick"], ["analyze", *ASK[1:]], ["doctor", "--model", "mini"])
          for wrong in (["--dtype", "int8"], ["--device", "warp"], ["--device", "cuda:99"])),
        ["serve", "--port", "0", "--dtype", "int8"],
        [*SGLANG, "--whole-first-layer"],
        [*SWEEP, "--first-layer", "half"],
        [*SWEEP, "--seeds", "0"],
        [*SWEEP, "--on-error", "ask"],
        [*ASK, "--max-new-tokens", "0"],
        [*BATCH, "--engine", "spark"],
        ["analyze", "--shape", "7b"],
        ["analyze", "--questions", "0"],
        ["analyze", "--on-error", "ask"],
        ["bench", "speed"],
        ["examples", "--name", "cat"],
        ["nothing"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_command_line_ends_with_two(run, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "missing.png", "what?"],
        [*ASK, "--model", "./nowhere"],
        [*ASK, "--overlay", "no/out.png"],
        ["analyze", "missing.png", "what?"],
        ["analyze", "--data", "missing.jsonl"],
        ["eval", "--model", "./nowhere"],
        [*SWEEP, "--data", "missing.jsonl"],
        ["eval", "--report", "missing.json"],
        BATCH,
        ["serve", "--port", "0", "--model", "./nowhere"],
        ["bench", "layers", "--out", "no/layers.json"],
        ["doctor", "--model", "./nowhere"],
    ],
    ids=" ".join,
)
def test_a_file_or_a_model_that_is_refused_ends_with_one(run, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.startswith("crosstrim: ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
