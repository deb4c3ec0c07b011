"""The table of measured layers says what the committed runs found."""

from __future__ import annotations

import json

from tests.docs import pages

RESULTS = "benchmarks/results/layers-11B-cpu.jsonl"
ROWS = {
    "one token, keep=0.5": ("decode", "all", "keep=0.5"),
    "one token, keep=0.25": ("decode", "all", "keep=0.25"),
    "one token, pictures of 1, 4, 2 and 4 tiles, lossless": ("decode", "all", "lossless"),
    "prompt, first layer, keep=0.5": ("prefill", "leader", "keep=0.5"),
    "prompt, later layers, keep=0.5": ("prefill", "followers", "keep=0.5"),
    "prompt, later layers, keep=0.25": ("prefill", "followers", "keep=0.25"),
}


def cells(results, phase, layer, trim):
    of_trim = {r["way"]: r for r in results if (r["phase"], r["layer"], r["trim"]) == (phase, layer, trim)}
    run = of_trim["crosstrim"]
    untrimmed = next(
        r for r in results
        if r["way"] == "untrimmed" and all(r[k] == run[k] for k in ("phase", "layer", "batch", "tiles"))
    )  # fmt: skip
    ratios = [f"{of_trim[way]['ratio']:.2f}" for way in ("plain", "crosstrim")]
    return [f"{untrimmed['ms']:.0f} ms", *ratios, f"{run['kv_ratio']:.2f}"]


def test_measured_layers():
    results = [json.loads(line) for line in pages.text(RESULTS).splitlines()]
    table = pages.table("docs/performance.md", "three cross-attention layers")
    assert [row["three cross-attention layers"] for row in table] == list(ROWS)
    for row in table:
        assert list(row.values())[1:] == cells(results, *ROWS[row["three cross-attention layers"]])
    assert {run["versions"]["device"] for run in results} == {"cpu"}
