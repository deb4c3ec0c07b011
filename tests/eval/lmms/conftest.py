"""Local tasks on mini's held-out pictures, and lmms-eval's own command line to run them, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from crosstrim import mini

# `make test-lmms` has lmms-eval; the other environments have not.
collect_ignore_glob = [] if importlib.util.find_spec("lmms_eval") else ["test_*.py"]

TASKS = Path(__file__).parent / "tasks"
ROOT = Path(__file__).parents[3]


def rows_of(kind, count):
    return [row for row in mini.heldout() if row["kind"] == kind][:count]


def others(row, count):
    """Wrong answers: what other questions of the kind have as theirs."""
    every = dict.fromkeys(one["answers"][0] for one in rows_of(row["kind"], 256))
    return [one for one in every if one not in row["answers"]][:count]


def seed_like():
    for place, row in enumerate(rows_of("place_to_digit", 8) + rows_of("digit_to_colour", 8)):
        options = others(row, 3)
        options.insert(place % 4, row["answers"][0])
        yield {
            "question_id": row["id"],
            "images": [row["image"]],
            "question": row["question"],
            **{f"choice_{letter}": option for letter, option in zip("abcd", options, strict=True)},
            "answer": "ABCD"[place % 4],
            "data_type": "image",
        }


def mme_like():
    for kind in ("count", "colour_to_digit"):
        for row in rows_of(kind, 5):
            for claim, answer in ((row["answers"][0], "Yes"), (others(row, 1)[0], "No")):
                yield {
                    "question_id": row["id"],
                    "category": kind,
                    "images": [row["image"]],
                    "question": row["question"],
                    "claim": claim,
                    "answer": answer,
                }


def mmvp_like():
    by_question = defaultdict(list)
    for row in rows_of("place_to_colour", 256):
        by_question[row["question"]].append(row)
    pairs = [
        pair
        for rows in by_question.values()
        for pair in combinations(rows[:4], 2)
        if pair[0]["answers"][0] != pair[1]["answers"][0]
    ][:5]
    for number, pair in enumerate(pairs):
        options = [row["answers"][0] for row in pair]
        for place, row in enumerate(pair):
            yield {
                "Index": 2 * number + place,
                "images": [row["image"]],
                "question": row["question"],
                "options": options,
                "answer": "AB"[place],
            }


def llava_like():
    for category, kind in (("conv", "digit_to_place"), ("detail", "read"), ("complex", "count")):
        rows = rows_of(kind, 5)
        for place, row in enumerate(rows):
            # Text alone, one picture, or three; the first two pictures of three are others than the one asked about.
            images = {3: [], 4: [rows[0]["image"], rows[1]["image"], row["image"]]}.get(place, [row["image"]])
            yield {
                "question_id": row["id"],
                "category": category,
                "images": images,
                "question": row["question"],
                "gpt_answer": row["answers"][0],
            }


DOCUMENTS = {one.__name__: list(one()) for one in (seed_like, mme_like, mmvp_like, llava_like)}


NAMES = (*DOCUMENTS, "stop_like")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder of tasks, whose YAML names the documents beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    for file in TASKS.iterdir():
        if file.suffix in (".yaml", ".py"):
            text = file.read_text(encoding="utf-8").replace("DATA", str(folder))
            (folder / file.name).write_text(text, encoding="utf-8")
    for name, rows in DOCUMENTS.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
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
def lmms_eval(tasks, tmp_path_factory):
    """Runs the command line on mini, every set of arguments once. "CACHE" stands for one folder in all runs."""
    kept = str(tmp_path_factory.mktemp("cache"))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "OMP_NUM_THREADS": "1",
    }

    @cache
    def run(model_args, *options, names=NAMES, launcher=()):
        folder = tmp_path_factory.mktemp("out")
        command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "crosstrim", "--model_args", model_args]
        command += ["--tasks", ",".join(names), "--include_path", tasks, "--output_path", folder, "--log_samples"]
        finished = subprocess.run(
            [kept if one == "CACHE" else str(one) for one in (*command, *options)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
        return Run(folder, names)

    return run
