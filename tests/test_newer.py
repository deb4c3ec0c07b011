from importlib.metadata import version

import pytest

from tests.support.newer import PINS, newer, pinned


@pytest.fixture(scope="module")
def pins():
    return PINS.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["torch", "transformers", "tokenizers", "fastapi", "starlette", "torchao"])
def test_another_version_of_what_crosstrim_works_with_is_told(pins, name):
    versions = {**pinned(pins), name: "99.0"}
    assert list(newer(pins, versions.__getitem__)) == [f"{name} 99.0 (pinned {pinned(pins)[name]})"]


def test_another_build_or_a_package_of_the_tests_alone_is_not(pins):
    versions = {**pinned(pins), "torch": f"{pinned(pins)['torch']}+cpu", "pytest": "99.0"}
    assert list(newer(pins, versions.__getitem__)) == []


def test_it_looks_at_what_is_installed(pins):
    line = next(line for line in pins.splitlines() if line.startswith("transformers=="))
    other = pins.replace(line, "transformers==5.0.1")
    assert f"transformers {version('transformers')} (pinned 5.0.1)" in newer(other)
