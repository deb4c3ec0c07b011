"""The table of measured layers says what the committed runs found."""

from __future__ import annotations

import json

from tests.docs import pages

RESULTS = "benchmarks/results/layers-11B-cpu.jsonl"
ROWS = {
    "one token, keep=0.5": ("decode", "all", "keep=0.5"),
    "one token, keep=0.25": ("decode", "all", "keep=0.25"),
    "one token, pictures of 1, 4, 2 and 4 tiles, lossless": ("decode", "all", "lossless"),
}


def cells(results, phase, layer, trim):
    of_trim = {r["way"]: r for r in results if (r["phase"], r["layer"], r["trim"]) == (phase, layer, trim)}
    return [
        *[f"{of_trim[way]['ratio']:.2f}" for way in ("plain", "crosstrim")],
        f"{of_trim['plain']['kv_ratio']:.2f}",
    ]


def test_measured_layers():
    results = [json.loads(line) for line in pages.text(RESULTS).splitlines()]
    table = pages.table("docs/performance.md", "three cross-attention layers")
    assert [row["three cross-attention layers"] for row in table] == list(ROWS)
    for row in table:
        assert list(row.values())[1:] == cells(results, *ROWS[row["three cross-attention layers"]])
    assert {run["versions"]["device"] for run in results} == {"cpu"}
