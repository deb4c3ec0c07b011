from __future__ import annotations

import importlib.util
import os

import pytest

# `make test-vllm` has vLLM; the other environments have not.
_NAMES = ("blocks", "decoding", "docs", "preemption", "refusals", "server", "shapes", "tokens")
collect_ignore = [f"test_{name}.py" for name in _NAMES]

if importlib.util.find_spec("vllm"):
    collect_ignore = []
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where its scheduler can be looked at
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }

import crosstrim  # noqa: E402 - vLLM reads the environment when it is imported
from tests.support import vllm_runs as runs  # noqa: E402


@pytest.fixture(scope="session")
def model():
    return crosstrim.load("mini")[0]


@pytest.fixture(scope="session")
def processor():
    return crosstrim.load("mini")[1]


@pytest.fixture(scope="session")
def mixed(processor):
    """Four tiles, one tile, two tiles, text alone in turn, and two pictures at the end."""
    return runs.mixed(processor)


@pytest.fixture(scope="session")
def expected(model, processor, mixed):
    """What crosstrim on transformers answers under a trim; asked once a trim."""
    known = {}

    def answers(requests=mixed, **options):
        for request in requests:
            key = id(request), repr(options)
            if key not in known:
                known[key] = runs.reference(model, processor, [request], **options)[0]
        return [known[id(request), repr(options)] for request in requests]

    return answers


@pytest.fixture(scope="session")
def start():
    """Starts engines, of which only the latest lives."""
    with runs.one_engine_at_a_time() as start:
        yield start


@pytest.fixture(scope="session", params=[{}, {"keep": 0.3}, {"keep": 40}], ids=str)
def trim(request):
    """What most engines are started with; pytest runs the tests of one in a row, on one engine."""
    return request.param
