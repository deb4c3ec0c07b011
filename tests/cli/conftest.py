from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from crosstrim import mini
from crosstrim.cli.program import app


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self):
        """The one object on stdout; fails when there is anything else."""
        return json.loads(self.stdout)


@pytest.fixture
def run(monkeypatch):
    """Run a command inside this process."""
    monkeypatch.delenv("CROSSTRIM_MODEL", raising=False)

    def call(*arguments, stdin: bytes | None = None) -> Outcome:
        result = CliRunner().invoke(app, [str(one) for one in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture
def spawn():
    """Run a command as a person does: the installed program, in a process of its own."""

    def call(*arguments, **options) -> subprocess.CompletedProcess:
        program = Path(sys.executable).with_name("crosstrim")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, timeout=120, env=environment, check=False, **options)

    return call


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """A picture that the tiny model sees as two tiles side by side."""
    pixels = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """A benchmark of three pictures of each of two layouts, three kinds of question each."""
    rows = []
    for number, (layout, size) in enumerate([("1x1", (28, 28)), ("1x2", (56, 28))] * 3):
        path = tmp_path / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        for kind in ("count", "read", "where"):
            question = {"count": "how many?", "read": "read all the digits.", "where": "where is it?"}[kind]
            row = {"id": f"{number}-{kind}", "image": str(path), "question": question, "answers": ["?"]}
            rows.append({**row, "kind": kind, "layout": layout})
    monkeypatch.setattr(mini, "heldout", lambda: rows)
    return rows


@pytest.fixture(scope="session")
def trained():
    """The embedded model's folder."""
    if not (mini.path() / "model.safetensors").is_file():
        pytest.fail(f"the embedded model is not at {mini.path()}: make it with `python -m recipes.mini`")
    return mini.path()
