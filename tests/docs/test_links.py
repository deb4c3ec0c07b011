from __future__ import annotations

import os
import re

import pytest

from tests.support.docs import pages


@pytest.mark.parametrize("name", pages.NAMES)
def test_links_between_files_resolve(name):
    links = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", pages.without_code(pages.text(name)))
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        assert (pages.ROOT / target).exists(), f"{name} links to {link}, which does not exist"
        if anchor:
            assert anchor in pages.anchors(target), f"{name} links to {link}, which has no such heading"


def test_the_readme_and_the_start_page_lead_to_every_page():
    start = pages.text("README.md") + pages.text("docs/index.md").replace("](", "](docs/")
    missing = [name for name in pages.NAMES if name != "README.md" and f"({name})" not in start]
    assert not missing


def test_the_readme_fits_on_a_screen():
    assert len(pages.text("README.md").splitlines()) <= 80
