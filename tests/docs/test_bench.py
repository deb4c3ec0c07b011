"""Committed results of the suites, and what the docs make of them."""

from __future__ import annotations

import crosstrim
from crosstrim.bench import bars, suites
from tests.support.docs import bench


def test_committed_results_are_whole_and_their_bars_are_todays():
    for name, result in bench.committed().items():
        assert (result["format"], result["suite"], result["size"]) == (suites.FORMAT, name, "full")
        assert result["complete"]
        assert result["versions"]["crosstrim"] == crosstrim.__version__
        assert result["bars"] == bars.judge(name, result["rows"])


def test_what_is_not_committed_is_not_measured():
    part = bench.part({})
    assert part.count("| not measured |") == len(bars.BARS)
    assert (
        '**Not measured** by a full run: "layers", "decode", "stack", "saliency", "growth", "merge", "session", '
        '"mini", "gpu".' in part
    )


def test_a_committed_result_is_shown_with_its_machine_and_missed_bars():
    result = suites.measure(suites.SUITES["session"], "tiny")
    for row in result["rows"]:
        if row["question"] == "second":
            row["ms"] = {"session": 12.0, "features given": 10.0}.get(row["way"], row["ms"])
    part = bench.part({"session": result})
    bar = "second question's time to first token, of the features given untrimmed"
    assert f"| {bar} | `session` | 1.1 | 1.2, missed |" in part
    assert "| entries into the vision tower for both questions | `session` | 1 | 1 |" in part
    assert "### Suite session" in part
    assert result["hardware"]["cpu"] in " ".join(part.split())
    assert (
        '**Not measured** by a full run: "layers", "decode", "stack", "saliency", "growth", "merge", "mini", "gpu".'
    ) in part
