"""The page and the figures of a result."""

from __future__ import annotations

import builtins
import re
from collections import Counter

import pytest
from PIL import Image

from crosstrim.data import pages
from crosstrim.errors import MissingExtraError, ResultError
from crosstrim.eval import metrics, settings, summary, sweep_page
from tests.support.figures import legends_within

CHOSEN = settings.expand(["union", "random", "oracle"], keep=[0.25, 0.5], first_layer="both", seeds=2)


@pytest.fixture(scope="module")
def result():
    """Eight questions of two kinds; a setting answers as many of them rightly as it keeps eighths, and one more."""
    items = [{"kind": "count" if number < 4 else "read", "visible": 8} for number in range(8)]
    predictions = {"untrimmed": {"answer": ["x"] * 8, "right": [True] * 8}}
    for setting in CHOSEN:
        eighths = int(8 * setting.config.keep)
        right = eighths + 1 - (setting.policy == "random:1") + (setting.policy == "oracle")
        predictions[setting.label] = {
            "answer": ["x"] * right + ["y"] * (8 - right),
            "right": [True] * right + [False] * (8 - right),
            "kept": [eighths] * 8,
            "kl": [0.25] * 8,
        }
    return {
        "dataset": {"name": "toy", "questions": 8, "left_out": ["row"]},
        "model": {"name": "tiny", "dtype": "float32", "cross_attention_layers": 4},
        "generation": {"max_new_tokens": 4},
        "versions": {"torch": "2"},
        "compat": {"vision": True, "other": False},
        "summary": summary.summarise(items, predictions, CHOSEN, 4),
    }


def test_numbers_by_hand(result):
    rows = {row["group"]: row for row in result["summary"]}
    union = rows["union keep=0.5"]
    assert union["overall"]["accuracy"]["mean"] == 5 / 8
    assert union["overall"]["accuracy_change"]["mean"] == -3 / 8
    assert union["overall"]["unchanged"]["mean"] == 5 / 8
    assert (union["kinds"]["count"]["accuracy"], union["kinds"]["count"]["questions"]) == (
        {"mean": 1, "low": 1, "high": 1},
        4,
    )
    assert union["kinds"]["read"]["accuracy"]["mean"] == 1 / 4
    assert rows["random keep=0.5"]["overall"]["accuracy"]["mean"] == pytest.approx(4.5 / 8)
    assert rows["random keep=0.5"]["seeds"] == 2
    assert rows["union keep=0.25, whole first layer"]["overall"]["cache_fraction"] == (1 + 3 * 0.25) / 4


def test_the_pareto_front_by_hand(result):
    front = {row["group"] for row in result["summary"] if row["pareto"]}
    assert front == {"union keep=0.25", "union keep=0.5"}


def test_equals_share_the_front():
    cell = {"cache_fraction": 0.5, "accuracy": {"mean": 0.5}}
    rows = [{"group": name, "curve": name, "overall": cell} for name in ("union", "grid", "untrimmed")]
    assert summary.front(rows) == {"union", "grid"}


def test_the_page(result):
    page = sweep_page.markdown(result)
    lines = page.splitlines()
    assert "- left out: 1 row that could not be asked" in lines
    assert "- repairs: vision" in lines
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    (header,) = (row for row in rows if "Pareto" in row)
    (found,) = (row for row in rows if row[0] == "union keep=0.5" and len(row) == len(header))
    row = dict(zip(header, found, strict=True))
    assert (row["kept"], row["cache"], row["KL"], row["Pareto"]) == ("50.0", "50.0", "0.25", "✓")
    assert re.fullmatch(r"62\.5 \[\d+\.\d, \d+\.\d\]", row["accuracy"])
    assert row["against untrimmed"].startswith("-37.5 [-")
    assert Counter(row[0] for row in rows)["random keep=0.25 (2 seeds)"] == 3  # all questions, and each kind
    assert str(metrics.RESAMPLES) in page


def test_figures_are_against_the_kept_share(result):
    figure = sweep_page.draw(result, "accuracy", "accuracy", pages.pyplot())
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["all questions (8)", "count (4)", "read (4)"]
    lines = {line.get_label(): line for line in panels[0].get_lines()}
    assert list(lines["union"].get_xdata()) == [25, 50]
    assert list(lines["union"].get_ydata()) == [37.5, 62.5]
    assert (lines["union"].get_linestyle(), lines["union, whole first layer"].get_linestyle()) == ("-", "--")
    assert lines["union"].get_color() == lines["union, whole first layer"].get_color()
    assert "kept" in figure.get_supxlabel()


def test_lines_say_how_the_cache_is_held(result):
    for row in result["summary"]:
        row["curve"] += ", int8 cache" * (row["curve"] in ("union", "lossless"))
    figure = sweep_page.draw(result, "accuracy", "accuracy", pages.pyplot())
    lines = {line.get_label(): line.get_linestyle() for line in figure.axes[0].get_lines()}
    assert (lines["union"], lines["union, whole first layer"]) == (":", "--")
    assert "lossless, int8 cache" not in lines
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-2:] == ["dashed: first layer's cache left whole", "dotted: cache in eight bits"]


@pytest.mark.parametrize("kinds", [1, 2])
def test_the_legend_is_on_the_page(result, kinds):
    names = list(result["summary"][0]["kinds"])[:kinds]
    many = [
        {**row, "curve": row["curve"].replace("o", f"o{number}", 1), "kinds": dict.fromkeys(names, row["overall"])}
        for number in range(4)
        for row in result["summary"]
    ]
    figure = sweep_page.draw({**result, "summary": many}, "accuracy", "accuracy", pages.pyplot())
    assert len([axes for axes in figure.axes if axes.get_title()]) == 1 + 2 * (kinds == 2)
    assert legends_within(figure)


@pytest.mark.parametrize("metric", ["accuracy", "unchanged"])
def test_a_single_budget_has_its_bands(result, metric):
    rows = [row for row in result["summary"] if "keep=0.25" not in row["group"]]
    figure = sweep_page.draw({**result, "summary": rows}, metric, metric, pages.pyplot())
    panels = [axes for axes in figure.axes if axes.get_title()]
    bars = {
        tuple(round(value, 6) for value in part[:, 1])
        for shown in panels[0].collections
        if hasattr(shown, "get_segments")
        for part in shown.get_segments()
    }
    cells = [row["overall"][metric] for row in rows if row["group"] != "untrimmed"]
    assert bars == {(round(100 * cell["low"], 6), round(100 * cell["high"], 6)) for cell in cells}
    assert legends_within(figure)


def test_files(result, tmp_path):
    files = sweep_page.write(result, tmp_path / "new" / "page")
    assert [path.name for path in files] == ["report.md", "accuracy.png", "unchanged.png"]
    for path in files[1:]:
        assert path.name in files[0].read_text(encoding="utf-8")
        assert min(Image.open(path).size) > 300


def test_a_folder_that_is_a_file(result, tmp_path):
    (tmp_path / "page").write_text("")
    with pytest.raises(ResultError, match="cannot be written to"):
        sweep_page.write(result, tmp_path / "page")


def test_without_matplotlib(result, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "matplotlib":
            raise ImportError
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'crosstrim\[viz\]'"):
        sweep_page.write(result, tmp_path)
    assert list(tmp_path.iterdir()) == []
