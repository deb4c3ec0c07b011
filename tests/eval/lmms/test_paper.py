"""The paper's benchmarks in one command, on tasks of their shape."""

from __future__ import annotations

import json

import pytest
from recipes import paper

STAND_INS = [paper.Number("SEED-Bench, pictures", "seed_like", "seed_image", 100)]


@pytest.fixture
def run(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    settings = {"untrimmed": "trim=False", "k=0.05": "k=0.05"}
    monkeypatch.setattr(paper, "SETTINGS", settings)
    options = ["--include_path", str(tasks), "--batch_size", "4"]
    return lambda folder: paper.run("mini", folder, STAND_INS, options=options)


def test_what_is_finished_stays_and_the_rest_is_run(run, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    monkeypatch.setitem(paper.SETTINGS, "k=0.05", "k=5")  # which is refused
    assert run(folder) == ["k=0.05 seed_like"]
    assert "k=5" in (folder / "k=0.05" / "seed_like.log").read_text(encoding="utf-8")
    (line,) = [one for one in (folder / "table.md").read_text().splitlines() if one.startswith("| k=0.05")]
    assert line == "| k=0.05 |  |  |"
    untrimmed = folder / "untrimmed" / "seed_like.json"
    written = untrimmed.stat().st_mtime_ns

    monkeypatch.setitem(paper.SETTINGS, "k=0.05", "k=0.05")
    assert run(folder) == []
    assert untrimmed.stat().st_mtime_ns == written
    found = json.loads((folder / "k=0.05" / "seed_like.json").read_text())
    right = 100 * found["results"]["seed_like"]["seed_image,none"]
    kept = 100 * found["throughput"]["avg_kept_fraction"]
    assert f"| k=0.05 | {right:.1f} ({kept:.1f} %) |  |" in (folder / "table.md").read_text()
    assert len((folder / "k=0.05" / "seed_like.samples.jsonl").read_text().splitlines()) == 16
    assert not list(folder.rglob("*.running"))


def test_published_numbers_stand_beside_the_model_that_they_are_of(tmp_path):
    page = paper.page("meta-llama/Llama-3.2-90B-Vision-Instruct", tmp_path)
    assert "| k=0.15 |  |  |  |  |  | 75.4 (51.0 %) |" in page
    assert "72.3" not in page
    assert "75.4" not in paper.page("mini", tmp_path)


def test_a_number_that_a_task_did_not_report_leaves_the_others(tmp_path):
    numbers = [paper.Number("this", "task", "one", 100), paper.Number("that", "task", "two")]
    (tmp_path / "lossless").mkdir()
    (tmp_path / "lossless" / "task.json").write_text(json.dumps({"results": {"task": {"one,none": 0.5}}}))
    assert "| lossless | 50.0 | not reported |  |" in paper.page("mini", tmp_path, numbers)
