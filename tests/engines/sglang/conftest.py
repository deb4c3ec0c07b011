from __future__ import annotations

import importlib.util

# `make test-sglang` has SGLang; the other environments have not.
collect_ignore = (
    []
    if importlib.util.find_spec("sglang")
    else ["test_capacity.py", "test_prompts.py", "test_server.py", "test_tokens.py"]
)
