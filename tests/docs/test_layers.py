"""The table of measured layers says what the committed run found."""

from __future__ import annotations

import json

from crosstrim.bench import bars
from tests.support.docs import pages

RESULTS = "benchmarks/results/layers.json"
HEADER = "three cross-attention layers, one token"
ROWS = {
    "float32, keep=0.5": ("float32", "keep=0.5", None),
    "float32, keep=0.25": ("float32", "keep=0.25", None),
    "float32, one feature": ("float32", "one feature", None),
    "bfloat16, keep=0.5": ("bfloat16", "keep=0.5", None),
    "bfloat16, keep=0.25": ("bfloat16", "keep=0.25", None),
    "bfloat16, one feature": ("bfloat16", "one feature", None),
    "bfloat16, pictures of 1, 4, 2 and 4 tiles, lossless": ("bfloat16", "lossless", [1, 4, 2, 4]),
}


def cells(rows, dtype, trim, tiles):
    place = {"phase": "decode", "layer": "all", "dtype": dtype, "trim": trim, "tiles": tiles}
    fields = (("plain", "ratio"), ("crosstrim", "ratio"), ("plain", "kv_ratio"))
    return [f"{bars.only(rows, field, way=way, **place):.2f}" for way, field in fields]


def test_measured_layers():
    rows = json.loads(pages.text(RESULTS))["rows"]
    table = pages.table("docs/performance.md", HEADER)
    assert [row[HEADER] for row in table] == list(ROWS)
    for row in table:
        assert list(row.values())[1:] == cells(rows, *ROWS[row[HEADER]])
