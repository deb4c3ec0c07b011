"""What is wrong with a request, from pydantic's findings, in words that name the field as the client wrote it."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from crosstrim.server import ollama_schema, schema
from crosstrim.server.wire import BRANCHES

_UNSUPPORTED = (
    {*schema.Unsupported.model_fields, *ollama_schema.Unsupported.model_fields},
    {*ollama_schema.UnsupportedOptions.model_fields},
)


def refusal(found: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first finding in words, and the path of its field if it has one.

    Args:
        found: of FastAPI's `RequestValidationError.errors`.
    """
    first = found[0]
    kind, steps = first["type"], [step for step in first["loc"][1:] if step not in BRANCHES]
    if kind == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']}, at character {first['loc'][-1]}.", None
    if not steps:
        return "the body must be a JSON object, sent with the content type application/json.", None
    path = ".".join(map(str, steps))
    if kind == "missing":
        return f"{path} is missing.", path
    if kind == "extra_forbidden":
        return f"this server does not support {path}; leave it out.", path
    value = reprlib.repr(first["input"])  # short, however much was sent
    # In the body, or in Ollama's options; steps that go on from there are its parts.
    place = next((place for place, step in enumerate(steps[:2]) if step in _UNSUPPORTED[place]), None)
    if place is not None or steps[-1] == "tool_calls":
        whole = "it" if place is None or not steps[place + 1 :] else ".".join(map(str, steps[: place + 1]))
        return f"this server does not support {path}={value}; leave {whole} out.", path
    words = "must be an object" if kind.startswith("model_") else re.sub(r"^\w+ should ", "must ", first["msg"])
    return f"{path} {words}, got {value}.", path
