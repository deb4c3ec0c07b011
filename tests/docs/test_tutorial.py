"""The tutorial runs from top to bottom, and says what it was committed with."""

from __future__ import annotations

import re

import nbformat
import pytest

from tests.support.docs import tutorial

LARGEST = 300_000
"""Bytes of the notebook, its pictures included."""


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(tutorial.NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial")
    yield tutorial.execute(folder)
    assert not list(folder.iterdir()), "it leaves nothing behind where it runs"


def test_it_prints_what_it_was_committed_with(committed, fresh):
    """Answers and certificates to the letter; how much a heads' union keeps may move with another processor."""

    def steady(notebook):
        return [re.sub(r"kept \d+ of .*|: half of .*", "", text) for text in tutorial.texts(notebook)]

    assert steady(fresh) == steady(committed), "run `python -m tests.support.docs.tutorial`"


def test_it_shows_that_the_budget_matters(fresh):
    text = "\n".join(tutorial.texts(fresh))
    answers = dict(re.findall(r"^(untrimmed|keep=[\d.]+) +([\d ]+\d) +\d+ of 260", text, flags=re.MULTILINE))
    right = answers.pop("untrimmed")
    assert answers == {"keep=0.5": right, "keep=0.2": right, "keep=0.05": answers["keep=0.05"]}
    assert answers["keep=0.05"] != right
    assert "certified: True" in text
    assert "safe: keep=" in text
    assert "orange {'visible': 260, 'kept': 20}" in text
    assert "the server ended with 0" in text


def test_its_pictures_are_there_and_small(committed, fresh):
    pictures = [
        "image/png" in output.get("data", {}) for cell in fresh.cells for output in cell.get("outputs", [])
    ].count(True)
    assert pictures == 3
    assert tutorial.NOTEBOOK.stat().st_size <= LARGEST


def test_it_installs_itself_only_where_it_must(fresh):
    (install,) = [cell for cell in fresh.cells if "%pip install" in cell.source]
    assert 'find_spec("crosstrim") is None' in install.source
    assert not install.outputs
