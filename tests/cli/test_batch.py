from __future__ import annotations

import json

import pytest

from crosstrim.asking import answering
from crosstrim.batch import ray as ray_batch


@pytest.fixture
def folder(picture):
    return picture.parent


def test_a_folder_of_pictures(run, folder, checkpoint, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ("batch", folder, out, "--question", "what?", "--keep", "9", "--model", checkpoint)
    result = run(*arguments, "--max-new-tokens", 3, "--json")
    assert result.code == 0, result.stderr
    assert result.json == {"rows": 1, "answered": 1, "failed": 0, "out": str(out)}
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["id"], row["visible"], row["kept"], row["error"]) == ("picture.png", 34, 9, None)
    again = run(*arguments, "--max-new-tokens", 3)
    assert (again.code, "give --resume" in again.stderr) == (1, True)
    resumed = run(*arguments, "--max-new-tokens", 3, "--resume")
    assert (resumed.code, resumed.stdout) == (0, "1 of 1 row answered\n")
    assert (result.stderr, resumed.stderr) == (
        f"crosstrim: wrote {out}\n",
        f"crosstrim: {out} is complete already; nothing was run.\n",
    )


@pytest.mark.parametrize("answered", [0, 1])
def test_an_interruption_says_how_to_go_on(run, picture, checkpoint, tmp_path, monkeypatch, answered):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text((json.dumps({"image": str(picture), "question": "what?"}) + "\n") * 2)
    generate, calls = answering.generate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) > answered:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr("crosstrim.asking.answering.generate", interrupted)
    arguments = ("batch", rows, out, "--model", checkpoint, "--batch-size", 1, "--max-new-tokens", 2)
    result = run(*arguments)
    words = "crosstrim: interrupted; what is done is kept, and the same command with --resume goes on.\n"
    assert (result.code, result.stdout, result.stderr) == (130, "", words * answered)
    monkeypatch.undo()
    assert run(*arguments, "--resume").stdout == "2 of 2 rows answered\n"


def test_files_that_are_no_rows_are_told_once(run, checkpoint, picture, tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "out.jsonl"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture.read_bytes())
    (folder / "b.heic").write_bytes(b"?")
    result = run("batch", folder, out, "--question", "what?", "--max-new-tokens", 1, "--model", checkpoint)
    assert (result.code, result.stdout) == (0, "1 of 1 row answered\n")
    assert result.stderr.count("passed over 1 file that is no picture by the ending (b.heic); taken are .avif") == 1


def test_failed_rows_are_counted(run, folder, checkpoint, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "missing.png", "question": "what?"}\n')
    result = run("batch", rows, tmp_path / "out.jsonl", "--model", checkpoint)
    assert result.code == 0
    assert "1 of 1 row failed" in result.stderr
    assert result.stdout == "0 of 1 row answered\n"


def test_ray_that_is_not_installed_is_named_before_anything_is_loaded(run, folder, tmp_path, monkeypatch):
    import importlib

    find = importlib.import_module
    missing = lambda name: find(name if not name.startswith("ray") else "no_such_module")  # noqa: E731
    monkeypatch.setattr(importlib, "import_module", missing)
    for asked in (("--engine", "ray"), ("--address", "ray.example:6379")):
        result = run("batch", folder, tmp_path / "out.jsonl", "--question", "what?", *asked)
        assert result.code == 1
        assert "pip install 'crosstrim[ray]'" in result.stderr


def test_where_a_cluster_is_given_the_job_goes_there(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_batch, "import_ray", lambda module: None)
    seen = []

    def answer(job, pending, *, address, workers):
        seen.append((address, workers))
        row = {"id": "1", "answer": "a", "visible": 1, "kept": 1, "kept_fraction": 1.0, "error": None}
        yield 0, [row]

    monkeypatch.setattr(ray_batch, "answer_on_ray", answer)
    result = run("batch", folder, tmp_path / "out.jsonl", "--question", "w?", "--address", "a:1", "--workers", 2)
    assert (result.code, seen) == (0, [("a:1", 2)])


@pytest.mark.parametrize(
    "wrong", [("--engine", "spark"), ("--workers", 2), ("--engine", "local", "--address", "a:1")]
)
def test_options_that_do_not_go_together(run, folder, tmp_path, wrong):
    assert run("batch", folder, tmp_path / "out.jsonl", "--question", "what?", *wrong).code == 2
