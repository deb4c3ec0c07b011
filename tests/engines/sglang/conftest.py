from __future__ import annotations

import importlib.util
import os

# `make test-sglang` has SGLang; the other environments have not.
collect_ignore = ["test_capacity.py", "test_prompts.py", "test_server.py", "test_tokens.py"]

if importlib.util.find_spec("sglang"):
    collect_ignore = []
    from tests.support import sglang_runs

    os.environ |= sglang_runs.ENVIRONMENT  # SGLang reads some of it when it is imported
