"""The numbers that the docs compute, computed again from the published configurations."""

from __future__ import annotations

import re

import pytest

from tests.support.docs import pages

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
    for row in pages.table("docs/performance.md", "batch size"):
        batch, *written = [number(cell) for cell in row.values()]
        saved = [100 * batch * dropped * kv / (weights + batch * kv) for dropped in (1 / 2, 7 / 8)]
        assert [round(share, 1) for share in saved] == written


def test_the_start_page_agrees(column, request):
    model = request.node.callspec.params["column"]
    shares = {"untrimmed": 1, "half of the features kept": 1 / 2}
    shares |= {"one tile of four, padding gone": 1 / 4, "one tile of four, half of the rest kept": 1 / 8}
    rows = pages.table("docs/index.md", "image KV of one picture")
    assert len(rows) == len(shares)
    for row in rows:
        assert number(row[model]) == round(image_kv(column) / MIB * shares[row["image KV of one picture"]])


def test_the_start_page_has_the_numbers_of_the_pages_it_links_to():
    found = {row["what"]: row for row in pages.table("docs/index.md", "what")}
    flight = found["Requests in flight on one 48 GB card, 11B"]
    table = next(rows for rows in pages.tables("docs/scaling.md") if rows[0][0] == "cards")
    card = next(dict(zip(table[0], row, strict=True)) for row in table if row[0] == "1 x 48 GB")
    assert flight["`keep=0.5`"] == f"{card['keep=0.5']} instead of {card['untrimmed']}"
    assert flight["`keep=0.25`"] == card["keep=0.25"]
    memory = found["Memory: keys and values of one picture, 11B"]
    sizes = {
        row["image KV of one picture"]: row["11B"] for row in pages.table("docs/index.md", "image KV of one picture")
    }
    assert memory["`keep=0.5`"] == f"{sizes['half of the features kept']} instead of {sizes['untrimmed']}"


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


def test_what_fits_on_which_cards():
    """Again from the formulas as the page states them, in its own units."""
    facts = {  # parameters, of which copied; cross-attention layers and the others
        "11B": (10_670_220_835, 895_028_755, 8, 32),
        "90B": (88_593_355_323, 926_490_131, 20, 80),
    }
    features = {"untrimmed": 6404, "one tile, lossless": 1601, "keep=0.5": 3202, "keep=0.25": 1601}
    page = pages.text("docs/scaling.md")
    titles = re.findall(r"^### (\S+) in (\S+)$", page, flags=re.MULTILINE)
    found = [rows for rows in pages.tables("docs/scaling.md") if rows[0][0] == "cards"]
    assert titles == [(model, engine) for model in facts for engine in ("transformers", "vLLM", "SGLang")]
    for (model, engine), (header, *rows) in zip(titles, found, strict=True):
        parameters, copied, cross, others = facts[model]
        assert rows
        for row in rows:
            cells = dict(zip(header, row, strict=True))
            cards, size = map(int, re.fullmatch(r"(\d) x (\d+) GB", cells["cards"]).groups())
            weights = 2 * (copied + (parameters - copied) / cards) / 1e9
            assert cells["weights"] == f"{weights:.1f} GB"
            for name, count in features.items():
                count = -(-count // 16) * 16 if engine == "vLLM" else count  # blocks of 16
                elements = (count + 512) * (cross + others) if engine == "SGLang" else count * cross + 512 * others
                assert int(cells[name]) == cards * (0.9 * size - weights) // (elements * 4096 / 1e9)


def test_what_fits_on_one_card():
    """Again from the formulas as the page states them."""
    facts = {  # parameters, of which in matrices that are quantised; cross-attention layers and the others
        "11B": (10_670_220_835, 8_698_986_496, 8, 32),
        "90B": (88_593_355_323, 85_479_915_520, 20, 80),
    }
    features = {"untrimmed": 6404, "one tile, lossless": 1601, "keep=0.5": 3202, "keep=0.25": 1601}
    bits = {"bf16": 16, "int8 or fp8": 8, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
    found = [rows for rows in pages.tables("docs/scaling.md") if rows[0][:2] == ["card", "weights"]]
    for (parameters, matrices, cross, others), (header, *rows) in zip(facts.values(), found, strict=True):
        shown = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows}
        for size in (12, 16, 24, 48, 80):
            for name, width in bits.items():
                weights = (2 * (parameters - matrices) + matrices * width / 8) / 1e9
                row = shown.pop((f"{size} GB", name), None)
                assert (row is not None) == (weights <= 0.9 * size)
                if row is not None:
                    assert row[""] == f"{weights:.1f} GB"
                    for tier, count in features.items():
                        kv = (count * cross + 512 * others) * 4096 / 1e9
                        assert int(row[tier]) == (0.9 * size - weights) // kv
        assert not shown


@pytest.mark.parametrize(("cards", "size"), [(1, 141), (2, 80), (4, 48), (8, 24)])
def test_what_is_not_in_the_tables_does_not_fit(cards, size):
    shown = {row[0] for rows in pages.tables("docs/scaling.md")[-3:] for row in rows}
    assert f"{cards} x {size} GB" not in shown
    assert 2 * (926_490_131 + (88_593_355_323 - 926_490_131) / cards) > 0.9 * size * 1e9
