"""Every Python block of README and docs runs as it stands; the blocks of one page share their names, in order."""

from __future__ import annotations

import pytest

from tests.support.docs import pages

# These need a server, or vLLM; tests/server and tests/engines/vllm run them.
ELSEWHERE = ("docs/ollama.md", "docs/serving.md", "docs/vllm.md")
WITH_CODE = [name for name in pages.NAMES if pages.snippets(name) and name not in ELSEWHERE]


@pytest.mark.parametrize("name", WITH_CODE)
def test_snippets_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, code in pages.snippets(name):
        # Blank lines before the code make a traceback name the page's own line.
        exec(compile("\n" * (line - 1) + code, pages.ROOT / name, "exec"), names)


def test_the_start_page_shows_what_was_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for _, code in pages.snippets("docs/index.md"):
        exec(code, names)
    first, *asked = capsys.readouterr().out.strip().splitlines()[1:]
    assert "visible image features" in first
    assert len(asked) == len(names["example"]["questions"])  # the session's
    assert all(
        any(text in line for text in one["answers"])
        for one, line in zip(names["example"]["questions"], asked, strict=True)
    )
