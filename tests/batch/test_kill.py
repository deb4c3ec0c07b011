"""A batch job that is killed at random moments loses no row, repeats none, and ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.support import killed_batch, processes
from tests.support.questions import without_answers

ASKED = 40
BATCHES = ASKED // 2 + 1  # of two rows each, the last one of what cannot be asked


def lines(path):
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.mark.slow
def test_killed_locally(checkpoint, questions, tmp_path):
    killed_and_resumed("local", 5, checkpoint, questions, tmp_path)


@pytest.mark.ray
def test_killed_on_ray(checkpoint, questions, tmp_path):
    """Every start is that of a cluster; that a journal outlives many kills is tested without one."""
    killed_and_resumed("ray", 1, checkpoint, questions, tmp_path)


def killed_and_resumed(engine, kills, checkpoint, questions, tmp_path):
    rows = questions([*without_answers(ASKED), {"image": "missing.png", "question": "what?"}, "{broken"])

    def begin(out, engine=engine):
        arguments, told = (engine, str(checkpoint), str(rows), str(tmp_path / out)), str(tmp_path / f"{out}.log")
        environment = {"RAY_USAGE_STATS_ENABLED": "0"}
        imported = [killed_batch.__name__] if engine == "ray" else []
        return processes.start(
            killed_batch.main, *arguments, told, log=tmp_path / "said", environment=environment, imported=imported
        )

    undisturbed = begin("other.jsonl", "local")
    log = tmp_path / "other.jsonl.log"
    while not lines(log) and undisturbed.is_alive():
        time.sleep(0.005)
    started = time.monotonic()
    processes.finish(undisturbed, tmp_path / "said")
    one_batch = (time.monotonic() - started) / BATCHES

    log, journal, moments = tmp_path / "run.jsonl.log", tmp_path / "run.jsonl.journal", random.Random(7)
    done: set[int] = set()
    for _ in range(kills):
        before = len(lines(log))
        process = begin("run.jsonl")
        enough = before + moments.randint(1, (BATCHES - 1) // kills)
        while len(lines(log)) < enough and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, one_batch))
        process.kill()
        process.join(60)
        time.sleep(0.5 if engine == "ray" else 0)  # its workers die with it, a moment later
        begun = {int(start) // 2 for start in lines(log)[before:]}
        assert not begun & done, "a batch that was on disk was answered again"
        done = {json.loads(line)["first"] // 2 for line in journal.read_bytes().split(b"\n")[1:-1]}
    assert 0 < len(done) < BATCHES, "the kills came too early or too late to show anything"
    before = len(lines(log))
    processes.finish(begin("run.jsonl"), tmp_path / "said")
    assert sorted(int(start) // 2 for start in lines(log)[before:]) == sorted(set(range(BATCHES)) - done)
    found = lines(tmp_path / "run.jsonl")
    assert found == lines(tmp_path / "other.jsonl")
    assert [json.loads(line)["id"] for line in found] == [
        *(row["id"] for row in without_answers(ASKED)),
        str(ASKED + 1),
        str(ASKED + 2),
    ]
    assert not journal.exists()
