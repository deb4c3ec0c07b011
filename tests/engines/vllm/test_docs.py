"""The first example of docs/vllm.md runs as it stands; test_server.py runs the second, which needs a server."""

from __future__ import annotations

import gc

import pytest

from tests.support.docs import pages

pytestmark = pytest.mark.vllm


def test_the_offline_example(capsys):
    from vllm.distributed import cleanup_dist_env_and_memory

    line, code = pages.snippets("docs/vllm.md")[0]
    names = {"__name__": "__main__"}
    exec(compile("\n" * (line - 1) + code, pages.ROOT / "docs/vllm.md", "exec"), names)
    whole, less = capsys.readouterr().out.strip().splitlines()[-2:]
    answers = names["example"]["questions"][0]["answers"]
    assert any(answer in whole for answer in answers)
    assert less
    names["llm"].llm_engine.engine_core.shutdown()
    del names
    gc.collect()
    cleanup_dist_env_and_memory()
