"""Local tasks on mini's held-out pictures, and lmms-eval's own command line to run them, offline."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.questions import write_rows

# `make test-lmms` has lmms-eval; the other environments have not.
collect_ignore_glob = ["test_*.py"]
NAMES = ()

if importlib.util.find_spec("lmms_eval"):
    from tests.support.lmms_documents import DOCUMENTS, NAMES

    collect_ignore_glob = []

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder of tasks, whose YAML names the documents beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    for file in TASKS.iterdir():
        if file.suffix in (".yaml", ".py"):
            text = file.read_text(encoding="utf-8").replace("DATA", str(folder))
            (folder / file.name).write_text(text, encoding="utf-8")
    for name, rows in DOCUMENTS.items():
        write_rows(folder, rows, f"{name}.jsonl")
    return folder


class Run:
    """What a run of lmms-eval wrote.

    Attributes:
        results: its results, parsed.
        samples: per task, its logged samples in the order of the documents.
    """

    def __init__(self, folder, names):
        (results,) = folder.rglob("*_results.json")
        self.results = json.loads(results.read_text(encoding="utf-8"))
        self.samples = {}
        for name in names:
            (file,) = folder.rglob(f"*_samples_{name}.jsonl")
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            self.samples[name] = sorted(lines, key=lambda one: one["doc_id"])

    def answers(self, name):
        return [one["filtered_resps"] for one in self.samples[name]]

    def accounts(self, name):
        """What the plugin says of each sample."""
        return [counts["crosstrim"] for one in self.samples[name] for counts in one["token_counts"]]


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Runs a program in a process that has its modules from another one, which has loaded no model."""
    imported = ["tests.support.lmms_imports", "crosstrim.cli.program", "crosstrim.eval.lmms.model"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield partial(processes.run, processes.as_program, imported=imported)


@pytest.fixture(scope="session")
def lmms_eval(tasks, forked, tmp_path_factory):
    """Runs the command line on mini, every set of arguments once. "CACHE" stands for one folder in all runs."""
    kept = str(tmp_path_factory.mktemp("cache"))

    @cache
    def run(model_args, *options, names=NAMES, launcher=()):
        folder = tmp_path_factory.mktemp("out")
        arguments = ["--model", "crosstrim", "--model_args", model_args, "--tasks", ",".join(names)]
        arguments += ["--include_path", tasks, "--output_path", folder, "--log_samples", *options]
        arguments = [kept if one == "CACHE" else str(one) for one in arguments]
        log = folder / "log.txt"
        if launcher:
            command = [sys.executable, *launcher, "-m", "lmms_eval", *arguments]
            with log.open("w", encoding="utf-8") as output:
                finished = subprocess.run(command, cwd=folder, stdout=output, stderr=output, timeout=600)
            assert finished.returncode == 0, log.read_text(encoding="utf-8")[-5000:]
        else:
            forked("lmms_eval", arguments, folder=folder, log=log)
        return Run(folder, names)

    return run
