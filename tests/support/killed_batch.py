"""A job that tells which batches it begins."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from crosstrim import TrimConfig
from crosstrim.asking.escalation import Escalation
from crosstrim.batch import run as batch
from crosstrim.batch.answerer import Job, answer_here
from crosstrim.batch.ray import answer_on_ray
from crosstrim.data.questions import open_questions

torch.set_num_threads(1)


class Told:
    """The rows, noting in a file which are read, from whatever process."""

    def __init__(self, rows, log):
        self._rows, self._log, self.sha256 = rows, log, rows.sha256

    def __len__(self):
        return len(self._rows)

    def read(self, places):
        descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{places.start}\n".encode())
        os.close(descriptor)
        return self._rows.read(places)


def main(engine: str, model: str, rows: str, out: str, log: str) -> None:
    told = Told(open_questions(Path(rows)), log)
    # Every answer is made twice, so that a kill may fall between the two.
    job = Job(
        told, model, None, "cpu", TrimConfig(k=0.25), max_new_tokens=8, batch_size=2, escalation=Escalation(1.0)
    )
    run = answer_on_ray if engine == "ray" else answer_here
    batch.run(job, Path(out), run, source=rows, resume=True)
