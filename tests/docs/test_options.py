from __future__ import annotations

import tomllib
from dataclasses import fields

from crosstrim import TrimConfig
from tests.support.docs import pages


def test_every_option_is_documented_with_its_default():
    documented = {
        row["option"].strip("`"): row["default"].strip("`") for row in pages.table("docs/method.md", "option")
    }
    actual = {field.name: field.default for field in fields(TrimConfig)}
    assert list(documented) == list(actual)
    for name, default in actual.items():
        written = f'"{default}"' if isinstance(default, str) else str(default)
        assert documented[name] == written, name


def test_every_policy_is_documented():
    from crosstrim.method.policies import POLICIES

    documented = [row["policy"].strip("`").partition(":")[0] for row in pages.table("docs/method.md", "policy")]
    assert sorted(documented) == sorted(POLICIES)


def test_every_extra_is_named_on_the_start_page():
    extras = set(tomllib.loads(pages.text("pyproject.toml"))["project"]["optional-dependencies"])
    listed = pages.text("docs/index.md").partition("Extras add")[2].partition("\n\n")[0]
    assert {name for name in extras if f"`{name}`" in listed} == extras - {"dev", "recipe"}
