"""The numbers that were measured: what README and docs show is what the committed results say."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from tests.docs import pages

RESULTS = pages.ROOT / "evaluation" / "results" / "mini-heldout.json"
SEEDS = "keep=0.07 random, mean of three seeds, first layer too"


@pytest.fixture(scope="module")
def results():
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    seeds = [value for name, value in measured.items() if "(seed" in name]
    assert len(seeds) == 3
    kinds = {kind: mean(one["kinds"][kind] for one in seeds) for kind in seeds[0]["kinds"]}
    average = {
        "kinds": kinds,
        "lookups": mean(one["lookups"] for one in seeds),
        "all": mean(one["all"] for one in seeds),
    }
    return {name: value for name, value in measured.items() if "(seed" not in name} | {SEEDS: average}


def shown(result):
    numbers = {"lookups": result["lookups"], "count": result["kinds"]["count"], "read": result["kinds"]["read"]}
    return {name: f"{value:.1f}" for name, value in (numbers | {"all": result["all"]}).items()}


def test_the_readme_shows_every_trim_as_measured(results):
    rows = {row.pop("setting"): row for row in pages.table("README.md", "setting")}
    assert list(rows) == [name for name in results if not name.startswith("without ")]
    for name, row in rows.items():
        kept = results[name].get("kept")
        assert row == {"kept": "" if kept is None else f"{100 * kept:.1f}"} | shown(results[name])


def test_what_each_departure_costs_is_as_measured(results):
    rows = {row.pop("repairs"): row for row in pages.table("docs/compat.md", "repairs")}
    assert list(rows) == ["untrimmed", *[name for name in results if name.startswith("without ")]]
    for name, row in rows.items():
        assert row == shown(results[name])


def test_the_number_of_questions():
    count = sum(json.loads(RESULTS.read_text(encoding="utf-8"))["questions"].values())
    assert f"{count} held-out questions" in " ".join(pages.text("README.md").split())
