from __future__ import annotations

import pytest

from tests.docs import pages, results


@pytest.mark.parametrize("name", results.PAGES)
def test_what_is_shown_is_what_was_measured(name):
    assert pages.text(name) == results.written(name), "run `python -m tests.docs.results`"
