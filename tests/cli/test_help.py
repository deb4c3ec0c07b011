"""The help pages, and that docs/cli.md holds what they say today."""

from __future__ import annotations

import pytest

from crosstrim.cli.program import app
from tests.support.docs import help_pages


def test_the_page_is_current():
    page = help_pages.PAGE.read_text(encoding="utf-8")
    assert page.split(help_pages.MARK)[1] == help_pages.generated(), "run `python -m tests.support.docs.help_pages`"


def test_the_page_has_every_verb():
    assert set(help_pages.VERBS) - {""} == {command.name for command in app.registered_commands}


@pytest.mark.parametrize("verb", [verb for verb in help_pages.VERBS if verb])
def test_every_verb_prints_json_and_explains_itself(run, verb):
    result = run(verb, "--help")
    assert result.code == 0
    assert "--json" in result.stdout
    assert result.stdout.count("\n") > 8


def test_without_a_verb_there_is_help(run):
    result = run()
    assert result.code == 2
    assert "Commands:" in result.stdout + result.stderr
