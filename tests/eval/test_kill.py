"""A process that is killed at random moments: nothing is computed twice, nothing is lost."""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.support import killed_sweep, processes

KILLS = 4


@pytest.fixture
def begin(checkpoint, write, rows, tmp_path):
    questions = write(rows)

    def call(out, log):
        paths = (str(path) for path in (checkpoint, questions, tmp_path / out, tmp_path / log))
        return processes.start(killed_sweep.main, *paths, log=tmp_path / "said")

    return call


def lines(path):
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.mark.slow
def test_killed_at_random_moments(begin, tmp_path):
    undisturbed = begin("other.json", "other.log")
    while not lines(tmp_path / "other.log") and undisturbed.is_alive():
        time.sleep(0.01)
    started = time.monotonic()
    processes.finish(undisturbed, tmp_path / "said")
    batches = lines(tmp_path / "other.log")
    one_batch = (time.monotonic() - started) / len(batches)
    log, journal, moments = tmp_path / "run.log", tmp_path / "run.json.journal", random.Random(3)
    done = 0
    for _ in range(KILLS):
        before = len(lines(log))
        process = begin("run.json", "run.log")
        enough = before + moments.randint(1, (len(batches) - 1) // KILLS)
        while len(lines(log)) < enough and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, one_batch))
        process.kill()
        process.join(60)
        on_disk = journal.read_bytes().count(b"\n") - 1
        begun = lines(log)[before:]
        assert begun == batches[done : done + len(begun)], "a batch that was on disk was computed again"
        assert done + len(begun) - 1 <= on_disk <= done + len(begun), "a batch that was computed is not on disk"
        done = on_disk
    assert 0 < done < len(batches), "the kills came too early or too late to show anything"
    before = len(lines(log))
    processes.finish(begin("run.json", "run.log"), tmp_path / "said")
    assert lines(log)[before:] == batches[done:]
    found, expected = (json.loads((tmp_path / name).read_text()) for name in ("run.json", "other.json"))
    for name in expected.keys() - {"seconds"}:
        assert found[name] == expected[name]
    assert not journal.exists()
