"""The numbers that the docs compute, computed again from the published configurations."""

from __future__ import annotations

import pytest

from tests.docs import pages

MIB, TERA = 2**20, 10**12


@pytest.fixture(params=["11B", "90B"])
def column(request):
    return {row[""]: row[request.param] for row in pages.table("docs/method.md", "")}


def number(cell: str) -> float:
    return float(cell.split()[0])


def image_kv(column):
    heads, size = number(column["key/value heads"]), number(column["head size"])
    features = number(column["features of one image, padding included"])
    return 2 * features * heads * size * 2 * number(column["cross-attention layers"])


def test_image_kv(column):
    assert number(column["features of one image, padding included"]) == 4 * (1 + (560 // 14) ** 2)
    assert round(image_kv(column) / MIB) == number(column["image KV of one image, untrimmed"])


def test_the_same_in_text_tokens(column):
    self_layers = number(column["text layers"]) - number(column["cross-attention layers"])
    token = 2 * number(column["key/value heads"]) * number(column["head size"]) * 2 * self_layers
    assert round(image_kv(column) / token) == number(column["the same in text tokens of self-attention KV"])


def test_projections(column):
    values = number(column["key/value heads"]) * number(column["head size"])
    features, hidden = number(column["features of one image, padding included"]), number(column["hidden size"])
    operations = 2 * 2 * features * hidden * values * number(column["cross-attention layers"])
    written = number(column["K and V projections of one image, all cross-attention layers"])
    assert round(operations / TERA, 2) == written


def test_vision_tower(column):
    rows = 4 * 1608
    operations = 40 * (24 * rows * 1280**2 + 4 * rows**2 * 1280)
    assert round(operations / TERA, 1) == number(column["vision tower on one image"])


def test_bytes_read_per_step():
    hidden = 4096
    weights = 2 * (40 * (2 * hidden**2 + 2 * hidden * 1024 + 3 * hidden * 14336) + hidden * 128256)
    kv = 2 * 6404 * 8 * 128 * 2 * 8
    assert (round(weights / 1e9, 1), round(kv / 1e9, 2)) == (18.5, 0.21)
    for row in pages.table("docs/performance.md", "batch"):
        batch, *written = [number(cell) for cell in row.values()]
        saved = [100 * batch * dropped * kv / (weights + batch * kv) for dropped in (1 / 2, 7 / 8)]
        assert [round(share, 1) for share in saved] == written


def test_the_readme_agrees(column, request):
    model = request.node.callspec.params["column"]
    shares = {"untrimmed": 1, "half of the features kept": 1 / 2}
    shares |= {"one tile of four, padding gone": 1 / 4, "one tile of four, half of the rest kept": 1 / 8}
    rows = pages.table("README.md", "image KV of one picture")
    assert len(rows) == len(shares)
    for row in rows:
        assert number(row[model]) == round(image_kv(column) / MIB * shares[row["image KV of one picture"]])


def test_kv_of_image_and_text(column, request):
    model = request.node.callspec.params["column"]
    units = {"KiB": 2**10, "MiB": MIB, "GiB": 2**30, "TiB": 2**40}
    self_layers = number(column["text layers"]) - number(column["cross-attention layers"])
    token = 2 * number(column["key/value heads"]) * number(column["head size"]) * 2 * self_layers
    shares = {"untrimmed": 1, "one tile, padding gone": 1 / 4, "keep=0.5": 1 / 2, "keep=0.25": 1 / 4}
    found = [rows for rows in pages.tables("docs/analysis.md") if rows[0][0] == "batch"]
    header, *rows = found[["11B", "90B"].index(model)]
    assert len(rows) == 12
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        text = number(cells["batch"]) * number(cells["text tokens"]) * token
        for name, share in shares.items():
            size, unit, ratio = cells[f"image KV, {name}"].split()
            image = number(cells["batch"]) * share * image_kv(column)
            assert float(size) * units[unit] == pytest.approx(image, rel=5e-3)
            assert float(ratio.strip("()x")) == pytest.approx(image / text, rel=5e-3)
        size, unit = cells["text KV"].split()
        assert float(size) * units[unit] == pytest.approx(text, rel=5e-3)
