from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from crosstrim.asking import answering
from crosstrim.asking.sureness import Sureness
from crosstrim.data import dataset
from crosstrim.eval import sweep
from tests.support.questions import with_answers, write_pictures, write_rows


@dataclass
class Said:
    """What the model says.

    Attributes:
        otherwise: by the number kept of the features, which of the questions it answers otherwise.
        sure: the lowest probability in its answers to a question, where it is not 0.99.
        batches: the ids of the questions of each batch that was asked.
    """

    otherwise: dict[float | None, set[str]] = field(default_factory=dict)
    sure: dict[str, float] = field(default_factory=dict)
    batches: list[list[str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write_pictures(folder)
    return dataset.read(write_rows(folder, with_answers()))


@pytest.fixture
def said(monkeypatch):
    """The forward pass is the real one; only the texts and how sure they are is replaced."""
    told = Said()
    answer, generate = sweep.Answerer.answer, answering.generate

    def watched(self, batch):
        told.batches.append([item.id for item in batch])
        return answer(self, batch)

    def replaced(model, processor, inputs, *, config=None, **rest):
        found = generate(model, processor, inputs, config=config, **rest)
        changed, asked = told.otherwise.get(None if config is None else config.keep, set()), told.batches[-1]
        texts = ["!" if one in changed else "?" for one in asked]
        return replace(found, texts=texts, sureness=[Sureness(told.sure.get(one, 0.99), 2) for one in asked])

    monkeypatch.setattr(sweep.Answerer, "answer", watched)
    monkeypatch.setattr("crosstrim.asking.answering.generate", replaced)
    return told
