"""The tables, the page and the figures of an analysis."""

from __future__ import annotations

import builtins
import json
import re

import pytest
import torch
from PIL import Image

from crosstrim.data import pages
from crosstrim.errors import MissingExtraError, ResultError
from crosstrim.eval import analysis, analysis_page, kv_table
from crosstrim.memory import SHAPES
from tests.support.figures import legends_within

SHAPE = SHAPES["11b"]


def result_of(layers, heads=3):
    """As of `analysis.run`, on one question of random attention."""
    scores = torch.rand(len(layers), heads, 40, generator=torch.Generator().manual_seed(0)) ** 4
    return {
        "format": 1,
        "dataset": {"name": "toy", "questions": 1},
        "model": {"name": "tiny", "dtype": "float32"},
        **analysis._named(analysis.measure(scores), layers),
        "memory": kv_table.compute(SHAPE),
        "versions": {"torch": "2"},
        "compat": {"vision": True, "other": False},
    }


@pytest.fixture(scope="module")
def result():
    return result_of([3, 8, 13])


def tables(result):
    return {
        table.title: [dict(zip(table.header, row, strict=True)) for row in table.rows]
        for table in analysis_page.tables(result)
    }


def test_tables_show_the_numbers(result):
    sparsity, agreement, first_layer, memory = tables(result).values()
    found = result["sparsity"][1]
    assert sparsity[1]["layer"] == "8"
    assert sparsity[1]["90 %"] == f"{100 * found['together']['0.9']:.1f}"
    heads = [100 * head for head in found["heads"]["0.9"]]
    assert sparsity[1]["90 %, one head"] == f"{sum(heads) / 3:.1f} ({min(heads):.1f} to {max(heads):.1f})"
    overlap = result["agreement"]["overlap"]["0.1"]
    assert [row["layers"] for row in agreement] == ["3 and 8", "3 and 13", "all pairs, mean", "chance"]
    assert agreement[1]["top 10 %"] == f"{100 * overlap[0][2]:.1f}"
    assert agreement[2]["top 10 %"] == f"{100 * (overlap[0][1] + overlap[0][2] + overlap[1][2]) / 3:.1f}"
    assert agreement[1]["rank correlation"] == f"{result['agreement']['rank_correlation'][0][2]:.2f}"
    assert agreement[3]["top 10 %"] == "10.0"
    setting = result["first_layer"][1]
    name = f"k=0.1, keeps {100 * setting['kept']:.1f} %"
    later = setting["later"][1]
    assert first_layer[1][name] == f"{100 * later['held']:.1f} ({100 * later['most']:.1f})"
    assert first_layer[2][name] == f"{100 * setting['kept']:.1f}"
    assert [row["layer"] for row in first_layer] == ["8", "13", "chance"]
    row = next(row for row in memory if (row["batch"], row["text tokens"]) == ("32", "1024"))
    assert row["text KV"] == "4 GiB"
    assert row["image KV, untrimmed"] == "6.25 GiB (1.56x)"


def test_the_page_has_every_table_and_figure(result):
    page = analysis_page.markdown(result, ["sparsity.png"])
    assert "- model: tiny, float32" in page
    assert "- questions: 1 of toy" in page
    assert "- repairs: vision" in page
    for table in analysis_page.tables(result):
        assert f"## {table.title}" in page
        assert table.note in page
    for line in page.splitlines():
        if line.startswith("| layers |"):
            assert line.count("|") == 6
    assert page.endswith("![sparsity](sparsity.png)\n")


def test_what_is_written(result, tmp_path):
    files = analysis_page.write(result, tmp_path / "new" / "folder")
    assert sorted(file.name for file in files) == sorted(
        file.name for file in (tmp_path / "new" / "folder").iterdir()
    )
    page = (tmp_path / "new" / "folder" / "analysis.md").read_text(encoding="utf-8")
    figures = re.findall(r"!\[\w+\]\((.+)\)", page)
    assert figures == ["sparsity.png", "agreement.png", "memory.png"]
    for name in figures:
        assert min(Image.open(tmp_path / "new" / "folder" / name).size) > 300
    assert json.loads((tmp_path / "new" / "folder" / "analysis.json").read_text(encoding="utf-8")) == result


@pytest.mark.parametrize("layers", [[3], list(range(3, 100, 5))])
def test_one_layer_and_twenty(layers, tmp_path):
    result = result_of(layers)
    assert len(analysis_page.write(result, tmp_path)) == 5
    assert ("Agreement between layers" in tables(result)) == (len(layers) > 1)


def test_bytes_alone(tmp_path):
    result = analysis.of_shape(SHAPE)
    assert [file.name for file in analysis_page.write(result, tmp_path)] == [
        *("analysis.json", "analysis.md", "memory.png"),
    ]
    assert list(tables(result)) == [f"KV bytes of {SHAPE.name}, computed"]


def test_the_figures_draw_the_numbers(result):
    plot = pages.pyplot()
    axes = analysis_page.draw_sparsity(result, plot).axes[0]
    heights = sorted(bar.get_height() for bar in axes.patches)
    assert heights == pytest.approx(sorted(100 * s for one in result["sparsity"] for s in one["together"].values()))
    dots = sorted(value for line in axes.lines for value in line.get_ydata())
    assert dots == pytest.approx(
        sorted(100 * s for one in result["sparsity"] for heads in one["heads"].values() for s in heads)
    )
    overlap, correlation, held = analysis_page.draw_agreement(result, plot).axes[:3]
    assert overlap.images[0].get_array().tolist() == result["agreement"]["overlap"]["0.1"]
    assert correlation.images[0].get_array().tolist() == result["agreement"]["rank_correlation"]
    (line,) = (line for line in held.lines if line.get_label() == "layer 13")
    assert list(line.get_ydata()) == [100 * setting["later"][1]["held"] for setting in result["first_layer"]]
    assert list(line.get_xdata()) == [100 * setting["kept"] for setting in result["first_layer"]]
    (untrimmed,) = (
        line for line in analysis_page.draw_memory(result, plot).axes[0].lines if line.get_label() == "untrimmed"
    )
    assert list(untrimmed.get_ydata()) == [12.5078, 1.5635, 0.1954]
    plot.close("all")


@pytest.mark.parametrize("layers", [[3], [3, 8, 13], list(range(3, 100, 5))], ids=len)
def test_every_legend_is_on_the_page(layers):
    plot, result = pages.pyplot(), result_of(layers)
    for draw in (analysis_page.draw_sparsity, analysis_page.draw_agreement, analysis_page.draw_memory):
        assert legends_within(draw(result, plot)), draw.__name__
    plot.close("all")


def test_where_nothing_can_be_written(result, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(ResultError, match=r"file cannot be written to: File exists"):
        pages.prepare(tmp_path / "file")


def test_without_matplotlib(result, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'crosstrim\[viz\]'"):
        analysis_page.write(result, tmp_path / "new")
    assert not (tmp_path / "new").exists()
