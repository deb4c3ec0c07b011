from __future__ import annotations

import gc
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import crosstrim
from crosstrim.models import compat
from tests.support import questions, tiny, tiny_checkpoint
from tests.support.tower import counted

torch.set_num_threads(1)  # tiny tensors: a second thread only gets in the way


def pytest_collection_finish():
    """Everything imported and collected stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def model():
    """A random Mllama, repaired to Meta's semantics."""
    fresh = tiny.build()
    compat.apply(fresh)
    return fresh


@pytest.fixture
def shallow_model():
    """A shallower Mllama, repaired likewise, for what is compiled."""
    fresh = tiny.shallow()
    compat.apply(fresh)
    return fresh


@pytest.fixture
def raw_model():
    """The same Mllama as transformers runs it."""
    return tiny.build()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a random Mllama and its processor; nobody writes to it."""
    return tiny_checkpoint.write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """The tiny model and its processor; nobody changes them for good."""
    return crosstrim.load(checkpoint)


@pytest.fixture
def tower(loaded):
    """How many images entered the vision tower of that model, pass by pass."""
    with counted(loaded[0]) as passes:
        yield passes


@pytest.fixture
def rows():
    """Three kinds of question about each of four pictures."""
    return questions.with_answers()


@pytest.fixture
def write(tmp_path):
    """Write rows beside the pictures that they name."""
    questions.write_pictures(tmp_path)
    return lambda rows: questions.write_rows(tmp_path, rows)
