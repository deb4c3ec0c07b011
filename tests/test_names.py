"""Lists of names and defaults that are kept apart from the code which they name."""

from __future__ import annotations

from crosstrim import config
from crosstrim.bench import names as suite_names
from crosstrim.bench import suites
from crosstrim.method import names, policies, quantisation


def test_the_names_are_those_of_the_code():
    assert list(names.POLICIES) == sorted(policies.POLICIES)
    assert {names.PAPER, names.BUDGETED} <= set(policies.POLICIES)
    assert tuple(quantisation._CODES) == names.KV_DTYPES
    assert tuple(suites.SUITES) == suite_names.SUITES


def test_what_decides_is_named_once():
    assert config.TrimConfig(k=0.5).decider == names.PAPER == policies.PAPER
    assert config.TrimConfig(keep=0.5).decider == names.BUDGETED == policies.BUDGETED
