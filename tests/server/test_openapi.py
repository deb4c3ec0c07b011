"""What the served schema promises holds for requests that are drawn from it, and from beside it."""

from __future__ import annotations

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as conformance

from tests.server.conftest import MODEL, asking, png

CHECKS = [
    checks.not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(start):
    """One whose answers are short, whatever is drawn."""
    with start(max_new_tokens=8) as running:
        yield running


@pytest.fixture(scope="module")
def promised(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=str)
def test_drawn_requests(promised, mode):
    operations = [found.ok() for found in promised.get_all_operations()]
    assert len(operations) == 12
    for operation in operations:
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing in them can be wrong

        @seed(1)
        @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def drawn(case):
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = MODEL  # nearly all that is drawn would end at the name otherwise
            case.call_and_validate(checks=CHECKS)

        drawn()


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": asking("what?", png()), "max_tokens": 2}),
        ("/api/chat", {"messages": [{"role": "user", "content": "what?"}], "options": {"num_predict": 2}}),
        ("/api/generate", {"prompt": "what?", "options": {"num_predict": 2}}),
    ],
)
def test_an_answer_is_as_promised(promised, server, path, asked):
    operation = promised[path]["POST"]
    reply = httpx.post(server.url + path, json={"model": MODEL, "stream": False, **asked})
    assert reply.status_code == 200
    operation.validate_response(reply)
