"""The site that `mkdocs build` wrote: whole, and nothing in it is fetched from elsewhere."""

from __future__ import annotations

import re

import pytest

import crosstrim
from tests.support.docs.pages import ROOT

SITE = ROOT / "build/site"
FETCHED = (
    r"""<(?:script|img|iframe|source|audio|video|embed)\b[^>]*?\bsrc=["']?((?:https?:)?//[^"' >]+)""",
    r"""<link\b(?=[^>]*rel=["']?(?:stylesheet|icon|pre|dns-))[^>]*?href=["']?((?:https?:)?//[^"' >]+)""",
    r"""@import\s+(?:url\()?["']?((?:https?:)?//[^"')]+)""",
    r"""url\(["']?((?:https?:)?//[^"')]+)""",
)
"""What a browser loads by itself; a link that a reader may follow is none of these."""


@pytest.fixture(scope="module")
def pages():
    found = {path.relative_to(SITE).as_posix(): path.read_text(encoding="utf-8") for path in SITE.rglob("*.html")}
    assert found, "run `mkdocs build` first"
    return found


def test_every_public_name_is_documented(pages):
    documented = set(re.findall(r'id="crosstrim\.([\w.]+)"', pages["api.html"]))
    assert {*crosstrim.__all__} - documented == {"CrosstrimError"}
    assert {f"errors.{name}" for name in vars(crosstrim.errors) if name.endswith(("Error", "Warning"))} <= documented
    assert {"TrimHandle.remove", "Session.ask", "policies.Policy.chosen", "compat.apply"} <= documented


def test_nothing_is_fetched_from_elsewhere(pages):
    styles = {path.name: path.read_text(encoding="utf-8") for path in SITE.rglob("*.css")}
    assert styles
    fetched = {
        name: found
        for name, text in {**pages, **styles}.items()
        if (found := [url for pattern in FETCHED for url in re.findall(pattern, text)])
    }
    assert not fetched


def test_what_a_browser_fetches_is_recognised():
    samples = [
        '<script async src="https://a.example/x.js">',
        '<link rel="stylesheet" href="//a.example/x.css">',
        '<img alt="" src=https://a.example/x.png>',
        "@font-face{src:url(https://a.example/x.woff2)}",
    ]
    assert all(any(re.search(pattern, sample) for pattern in FETCHED) for sample in samples)
    assert not any(re.search(pattern, '<a href="https://a.example">') for pattern in FETCHED)


def test_the_tutorial_is_a_page_with_its_pictures(pages):
    assert pages["tutorial.html"].count('src="tutorial_files/') == 3
    assert all((SITE / src).is_file() for src in re.findall(r'src="(tutorial_files/[^"]+)"', pages["tutorial.html"]))
    assert 'href="tutorial.html"' in pages["index.html"]


def test_links_out_of_the_docs_lead_to_the_repository(pages):
    link = 'href="https://github.com/crosstrim/crosstrim/blob/main/src/crosstrim/method/choose.py"'
    assert link in pages["architecture.html"]
    assert not [name for name, text in pages.items() if re.search(r'href="(?:\.\./)+(?:src|evaluation|tests)/', text)]
