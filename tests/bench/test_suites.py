"""Every suite at its smallest: the rows it promises, an envelope that says what they depend on, and the bars."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import crosstrim
from crosstrim.bench import bars, gpu, growth, layers, page, saliency, stack, suites
from crosstrim.bench.shapes import SHAPES
from crosstrim.errors import CrosstrimError, DeviceError, ResultError

PARTS = {"format", "suite", "size", "config", "rows", "bars", "complete", "versions", "hardware"}


@pytest.fixture(scope="module")
def told():
    """Per suite, how many rows were there and whether these were all, whenever it was told."""
    return {}


@pytest.fixture(scope="module")
def measured(told):
    """Each suite's result, run once."""
    found = {}

    def get(name):
        if name not in found:
            seen = told[name] = []
            found[name] = suites.measure(
                suites.SUITES[name], "tiny", lambda result: seen.append((len(result["rows"]), result["complete"]))
            )
        return found[name]

    return get


@pytest.mark.parametrize("name", suites.SUITES)
def test_results_are_json_and_say_what_they_depend_on(measured, name):
    result = measured(name)
    assert set(result) == PARTS
    assert (result["format"], result["suite"], result["size"]) == ("crosstrim-bench/1", name, "tiny")
    assert result["complete"]
    assert json.loads(json.dumps(result))["rows"] == result["rows"]
    assert {"crosstrim", "torch", "transformers", "python", "device"} <= set(result["versions"])
    assert {"cpu", "cores", "threads", "load", "torch", "triton", "gpus"} <= set(result["hardware"])
    assert set(suites.SUITES[name].settings) == {"full", "quick", "tiny"}


@pytest.mark.parametrize("name", suites.SUITES)
def test_what_people_read_is_in_the_rows(measured, name):
    suite, rows = suites.SUITES[name], measured(name)["rows"]
    fields = {field for row in rows for field in row}
    unseen = {"ms_p20", "ms_p80"} if name == "gpu" else set()
    assert set(suite.columns) - unseen <= fields
    drawn = [row for row in rows if all(row.get(field) == value for field, value in suite.only)]
    assert drawn
    assert all({suite.across, suite.up} <= set(row) for row in drawn)


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_bar_is_judged_and_its_figure_is_a_number(measured, name):
    judged = measured(name)["bars"]
    assert [one["name"] for one in judged] == [bar.name for bar in bars.of(name)]
    for one in judged:
        assert one["figure"] >= 0
        assert one["met"] is (one["figure"] <= one["limit"])


def test_bars_of_bytes_are_met_at_any_size(measured):
    figures = {one["name"]: one for one in measured("layers")["bars"]}
    assert figures["KV bytes of all cross-attention layers, keep=0.5"]["figure"] == 0.5
    assert figures["KV bytes, picture of one tile, lossless"]["figure"] == 0.25


def test_a_quick_run_measures_every_bar():
    """The settings alone are looked at: at their real sizes they are too much for a test."""
    quick = suites.SUITES["layers"].settings["quick"]["cases"]
    tiny = [case | {"rounds": 1} for case in quick]
    rows = list(layers.run("tiny", tiny))
    assert len(bars.judge("layers", rows)) == len(bars.of("layers"))
    assert {4096, 512} <= set(suites.SUITES["saliency"].settings["quick"]["rows"])


def test_rows_are_handed_out_while_the_suite_runs(measured, told):
    rows = measured("session")["rows"]
    assert told["session"] == [(number, False) for number in range(1, len(rows) + 1)]


def test_sessions_enter_the_tower_once_and_nobody_else_does(measured):
    entries = {(row["way"], row["question"]): row["vision_tower_entries"] for row in measured("session")["rows"]}
    assert entries == {
        ("untrimmed", "first"): 1,
        ("untrimmed", "second"): 1,
        ("trimmed", "first"): 1,
        ("trimmed", "second"): 1,
        ("session", "first"): 1,
        ("session", "second"): 0,
        ("features given", "first"): 1,
        ("features given", "second"): 0,
    }


def test_decoding_holds_what_is_kept(measured):
    rows = measured("decode")["rows"]
    assert [row["batch"] for row in rows] == [1] * 5 + [2] * 5 + [4] * 5
    for row in rows:
        kept = {1.0: 68, 0.5: 34, 0.1: 7}[row["kept"]]
        assert row["kv_bytes"] == row["batch"] * 3 * 2 * 4 * kept * 8 * 4


def test_mini_is_measured_every_way(measured):
    rows = measured("mini")["rows"]
    assert len(rows) == 7
    assert all(row[field] > 0 for row in rows for field in ("prompts_per_s", "first_token_ms", "per_token_ms"))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read off Linux's /proc")
def test_peaks_are_measured_in_processes_of_their_own(measured):
    scores = [row for row in measured("saliency")["rows"] if row["what"] == "score"]
    assert len(scores) == 2
    assert all(row["peak_mib"] is not None and row["resident_mib"] is not None and row["ms"] > 0 for row in scores)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read off Linux's /proc")
def test_the_peak_is_what_scoring_allocates(monkeypatch):
    """64 MiB that are held for a moment while it scores do not go unseen."""
    genuine, shape = crosstrim.saliency, SHAPES["tiny"]

    def wasteful(*args):
        torch.ones(2**24).sum()
        return genuine(*args)

    frugal = saliency._score(shape, 8, 0)["resident_mib"]
    monkeypatch.setattr(crosstrim, "saliency", wasteful)
    assert saliency._score(shape, 8, 0)["resident_mib"] >= 60 > frugal


def test_a_measuring_process_that_fails_is_no_result(monkeypatch):
    monkeypatch.setattr(saliency.sys, "executable", "/bin/false")
    with pytest.raises(CrosstrimError, match=r"scores 8 rows ended with code 1: it was killed; give it more memory"):
        list(saliency.run(**suites.SUITES["saliency"].settings["tiny"]))


def test_without_a_gpu_its_suite_names_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"needs a CUDA device, and torch sees none; run it on a machine with"):
        suites.measure(suites.SUITES["gpu"])


def test_the_gpu_suite_has_a_row_for_everything(measured):
    rows = measured("gpu")["rows"]
    counts = {kind: sum(row["what"] == kind for row in rows) for kind in dict.fromkeys(row["what"] for row in rows)}
    assert counts == {
        "score": 1,
        "choose": 2,
        "vision tower": 1,
        "weights": 1,
        "generate": 4 * 7,
        "largest batch": 2 * 4,
    }
    assert {row["status"] for row in rows} == {"fits"}


def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch):
    genuine = gpu._generate

    def scarce(model, way, inputs, steps):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no more")
        return genuine(model, way, inputs, steps)

    monkeypatch.setattr(gpu, "_generate", scarce)
    case = gpu.SETTINGS["tiny"]["cases"][0] | {"tiles": [1], "batches": [1, 4], "larger": []}
    rows = list(gpu.run(**gpu.SETTINGS["tiny"] | {"cases": [case]}))
    assert [row["status"] for row in rows if row.get("batch") == 4] == ["does not fit"] * 7
    assert [row["status"] for row in rows if row["what"] == "generate" and row["batch"] == 1] == ["fits"] * 7
    rows = list(gpu.run(**gpu.SETTINGS["tiny"] | {"cases": [case | {"batches": [2], "larger": [3, 8]}]}))
    largest = [row for row in rows if row["what"] == "largest batch"]
    assert [(row["batch"], row["next_batch"], row["status"]) for row in largest] == [(2, 3, "does not fit")] * 4


def test_a_spent_time_budget_ends_in_an_orderly_way():
    rows = list(gpu.run(**gpu.SETTINGS["tiny"] | {"budget_s": -1}))
    assert [row["status"] for row in rows if row["what"] != "weights"] == ["not reached in time"] * (3 + 1 + 4 + 8)


def test_a_bar_reads_exactly_one_row():
    rows = [{"way": "a", "ms": 1.5}, {"way": "b", "ms": None}, {"way": "c", "ms": 1}, {"way": "c", "ms": 2}]
    assert bars.only(rows, "ms", way="a") == 1.5
    for way, count in (("b", 1), ("c", 2), ("d", 0)):
        with pytest.raises(ResultError, match=rf"{count} rows have way='{way}', where a bar reads 'ms'"):
            bars.only(rows, "ms", way=way)


def test_the_memory_bars_see_the_highest_peak_and_how_it_grows():
    def judge(peaks):
        rows = [
            {"what": "score", "rows": rows, "peak_mib": peak, "resident_mib": 2 * peak}
            for rows, peak in peaks.items()
        ]
        rows += [{"what": "choose", "policy": policy, "kept": 640, "ms": 1.0} for policy in saliency.POLICIES]
        rows += [{"what": "lead", "rows": 512, "way": "crosstrim", "ratio": 1.0}]
        highest, growth, *_ = bars.judge("saliency", rows)
        return highest["figure"], highest["met"], growth["figure"], growth["met"]

    assert judge({32: 10.0, 512: 40.0, 2048: 50.0, 4096: 42.0}) == (100.0, True, 1.05, True)
    assert judge({512: 100.0, 4096: 150.0}) == (300.0, False, 1.5, False)


@pytest.mark.parametrize("name", suites.SUITES)
def test_files(measured, name, tmp_path):
    result = measured(name)
    files = page.write(result, tmp_path / "new" / "folder")
    assert [file.name for file in files] == [f"{name}.{ending}" for ending in ("json", "csv", "md", "png")]
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(result))
    header, *lines = files[1].read_text().splitlines()
    assert len(lines) == len(result["rows"])
    assert header.split(",")[0] == next(iter(result["rows"][0]))
    text = files[2].read_text()
    assert ("| bar | measured | at most | met |" in text) is bool(bars.of(name))
    assert f"![{name}]({name}.png)" in text


def test_slopes_are_powers_between_sizes_that_lie_far_enough_apart():
    earlier = [{"value": 1, "ms": 2.0}, {"value": 2, "ms": 9.0}]
    assert growth.slope(earlier, {"value": 3, "ms": 5.0}, "ms") is None
    assert growth.slope(earlier, {"value": 4, "ms": 8.0}, "ms") == 1.0
    assert growth.slope(earlier, {"value": 8, "ms": 9.0}, "ms") == 0.0
    assert growth.slope(earlier, {"value": 8, "ms": None}, "ms") is None


def test_the_growth_bars_tell_what_must_stay_flat_from_what_may_grow():
    def row(what, along, time, memory):
        return {"what": what, "along": along, "time_slope": time, "memory_slope": memory}

    rows = [row("choose", "rows", 1.1, 0.05), row("step", "rows", 0.1, 0.02), row("prompt", "batch", 1.0, None)]
    rows.append(row("prompt", "images", None, 0.9))
    assert [one["figure"] for one in bars.judge("growth", rows)] == [1.1, 0.1, 0.9, 0.05]
    with pytest.raises(ResultError, match="no row has what a bar is read off"):
        bars.judge("growth", [row("step", "batch", 1.0, 1.0)])


def test_what_a_period_asks_for_is_that_of_the_11b_decoder():
    """The period's weights are an eighth of the decoder's, and a feature's bytes those of one layer."""
    shape = SHAPES["11B"]
    one = stack.load(shape, 6404, 6404 * 4096, phase="step", rows=0, batch=2, element=2)
    cross, own = 2 * 4096**2 + 3 * 4096 * 14336, 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert one.weights == 2 * (cross + 4 * own)
    assert one.cached == 2 * 6404 * 2 * 1024 * 2
    assert one.operations == 2 * (2 * (cross + 4 * own) + 4 * 4096 * 6404)
    prompt = stack.load(shape, 6404, 0, phase="prompt", rows=1, batch=1, element=2)
    assert prompt.operations - one.operations / 2 == 2 * 4096 * 2048 * 6404 + 4 * 4096 * 4
