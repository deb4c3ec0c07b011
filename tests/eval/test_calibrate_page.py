"""The page and the figure of a calibration."""

from __future__ import annotations

import re

import pytest

from crosstrim.data import pages
from crosstrim.eval import calibrate_page, risk
from tests.support.figures import legends_within

COUNT, LEVELS = 100, {"risk": 0.05, "confidence": 0.95, "loss": "answer", "seed": 4, "drawn_from": 250}
LOST = {0.5: (0, COUNT), 0.2: (1, COUNT), 0.1: (2, 60)}


def point(keep, lost, asked, count):
    most = lost + count - asked
    low, high = risk.interval(lost, most, count, 0.95)
    return {"questions": count, "asked": asked, "lost": lost, "low": low, "high": high,
            "bound": risk.upper(most, count, 0.05)}  # fmt: skip


@pytest.fixture(params=[1, 2])
def result(request):
    kinds = ["count", "read"][: request.param]
    curve = [
        {"label": f"union keep={keep}", "kept_fraction": keep, "certified": keep > 0.1,
         **point(keep, lost, asked, COUNT), "kinds": {kind: point(keep, 0, 30, 50) for kind in kinds}}
        for keep, (lost, asked) in LOST.items()
    ]  # fmt: skip
    return {
        "dataset": {"name": "toy", "questions": COUNT, "left_out": ["row"]},
        "model": {"name": "tiny", "dtype": "float32"},
        "generation": {"max_new_tokens": 4},
        "versions": {"torch": "2"},
        "compat": {"vision": True, "other": False},
        "calibration": LEVELS,
        "curve": curve,
        "chosen": {"label": "union keep=0.2"},
        "refusal": None,
    }


def test_the_page_says_what_was_run_and_found(result):
    page = calibrate_page.markdown(result)
    assert "- questions: 100 of 250 of toy, drawn with seed 4" in page
    assert "- left out: 1 row that could not be asked" in page
    assert (
        "The smallest budget certified for a risk of at most 5.0 % with confidence 95.0 % is union keep=0.2." in page
    )
    # Closed forms: 1 - 0.05^(1/100) for no change, and 1 - 0.025^(1/100).
    assert "| union keep=0.5 | 50.0 | 0 of 100 | [0.00, 3.62] | 2.95 | ✓ |" in page
    assert re.search(r"\| union keep=0\.1 \| 10\.0 \| 2 of 60 \| .* \|  \|\n", page)
    kinds = list(result["curve"][0]["kinds"])
    assert re.findall("^## (.*)$", page, flags=re.MULTILINE) == [
        "All questions", *(kinds if len(kinds) > 1 else []), "Figures"
    ]  # fmt: skip
    refused = calibrate_page.markdown({**result, "chosen": None, "refusal": "it lost too many."})
    assert "No budget is certified for a risk of at most 5.0 % with confidence 95.0 %: it lost too many." in refused


def test_the_figure_shows_points_bound_and_choice(result):
    plot = pages.pyplot()
    figure = calibrate_page.draw(result, plot)
    (axes,) = figure.axes
    lines = {line.get_label(): [list(map(float, line.get_data()[one])) for one in (0, 1)] for line in axes.lines}
    assert lines["measured"] == [[50, 20], [0, 1]]
    assert lines["stopped early"] == [[10], [pytest.approx(100 * 2 / 60)]]
    assert lines["chosen"] == [[20], [1]]
    assert lines["risk allowed"][1] == [5, 5]
    assert lines["bound"][1] == [pytest.approx(100 * row["bound"]) for row in result["curve"]]
    assert legends_within(figure)
    plot.close(figure)
