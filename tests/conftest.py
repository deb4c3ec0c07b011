from __future__ import annotations

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from crosstrim.models import compat
from tests import tiny, tiny_checkpoint

torch.set_num_threads(1)  # tiny tensors: a second thread only gets in the way


@pytest.fixture
def model():
    """A random Mllama, repaired to Meta's semantics."""
    fresh = tiny.build()
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
