from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from typing import get_type_hints

import numpy as np
import pytest

from crosstrim import TrimConfig
from crosstrim.config import TrimOptions, resolve
from crosstrim.errors import ConfigError
from crosstrim.method import policies


@pytest.mark.parametrize(
    ("options", "wording"),
    [
        ({"k": 0}, "k=0 must be a share above 0 and at most 1"),
        ({"k": 1.5}, "k=1.5 must be"),
        ({"k": -0.1}, "k=-0.1"),
        ({"k": float("nan")}, "k=nan"),
        ({"k": "0.25"}, "k='0.25'"),
        ({"k": True}, "k=True"),
        ({"k": np.True_}, "k=np.True_"),
        ({"keep": np.float32(1.5)}, "keep=np.float32.1.5. must be a share"),
        ({"keep": 5, "policy": "random:nan"}, "seed=nan must be a whole number"),
        ({"keep": 0}, "keep=0 as a count must be at least 1"),
        ({"keep": 0.0}, "keep=0.0 must be a share above 0"),
        ({"keep": 1.5}, "keep=1.5 .* whole number"),
        ({"keep": -3}, "keep=-3"),
        ({"k": 0.5, "keep": 0.5}, "k=0.5 and keep=0.5 .* give one of them"),
        ({"k_base": "everything"}, "k_base='everything' must be one of 'visible', 'all'"),
        ({"rating_rows": "first"}, "rating_rows='first' must be one of 'all', 'last_turn'"),
        ({"merge": "yes"}, "merge='yes' must be True or False"),
        ({"trim_first_layer": 1}, "trim_first_layer=1 must be True or False"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4' must be one of None, 'int8', 'fp8'"),
        ({"policy": "unoin"}, "policy='unoin' is unknown.*Did you mean 'union'"),
        ({"policy": 3}, "policy=3 is unknown"),
        (
            {"policy": "oracle", "keep": 0.5},
            r"policy='oracle' looks ahead.*`crosstrim eval --out FILE\.json --policy oracle`, or choose one of ",
        ),
    ],
)
def test_bad_options_are_named(options, wording):
    with pytest.raises(ConfigError, match=wording):
        TrimConfig(**options)


@pytest.mark.parametrize(
    "config",
    [
        TrimConfig(),
        TrimConfig(k=0.25),
        TrimConfig(keep=2048, policy="random", user_turn_ids=(1, 2)),
        TrimConfig(kv_dtype="int8"),
        TrimConfig(keep=1.0, k_base="all", rating_rows="last_turn", trim_first_layer=False),
    ],
)
def test_round_trip_through_json(config):
    text = json.dumps(config.to_dict())
    again = TrimConfig.from_dict(json.loads(text))
    assert again.to_dict() == config.to_dict()
    assert again == (config if config.lossless else replace(config, policy=config.decider)), "who decides is named"
    assert json.loads(text)["version"] == 1


def mine(evidence):
    return evidence.saliency


def test_a_policy_of_your_own_is_named_but_does_not_travel():
    for policy, name in ((mine, "tests.test_config.mine"), (policies.Mean(), "Mean()")):
        values = json.loads(json.dumps(TrimConfig(keep=5, policy=policy).to_dict()))
        assert values["policy"] == name
        with pytest.raises(ConfigError, match=re.escape(f"policy={name!r} is unknown")):
            TrimConfig.from_dict(values)


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="unknown option 'kk'; TrimConfig has"):
        TrimConfig.from_dict({"kk": 0.25})
    with pytest.raises(ConfigError, match="format version 2"):
        TrimConfig.from_dict({"version": 2})


def test_numpys_numbers_become_pythons():
    assert [type(TrimConfig(keep=one).keep) for one in (np.int64(5), np.float32(0.5), np.float64(0.5))] == [
        *(int, float, float)
    ]
    assert TrimConfig(k=np.float32(0.1)).k == 0.1, "as it prints, not the bits"
    assert TrimConfig(k=Fraction(1, 4)).k == 0.25
    assert type(TrimConfig(k=np.float64(0.25)).k) is type(TrimConfig(k=1).k) is float
    assert json.dumps(TrimConfig(keep=np.int64(5)).to_dict())


def test_keep_of_one_is_a_count_and_of_one_point_zero_a_share():
    assert isinstance(TrimConfig(keep=1).keep, int)
    assert isinstance(TrimConfig(keep=1.0).keep, float)


def test_without_a_policy_k_is_the_papers_and_keep_is_ours():
    assert TrimConfig(k=0.25).decider == "union"
    assert TrimConfig(keep=0.25).decider == TrimConfig(keep=7).decider == "contribution"
    assert TrimConfig(keep=0.25, policy="union").decider == "union"
    assert TrimConfig(keep=0.25).to_dict()["policy"] == "contribution"
    assert TrimConfig.from_dict({"keep": 0.25}) == TrimConfig(keep=0.25)
    assert TrimConfig().lossless
    assert TrimConfig().to_dict()["policy"] is None


def test_another_knob_brings_its_own_default():
    assert replace(TrimConfig(k=0.25), k=None, keep=0.2) == TrimConfig(keep=0.2)
    assert replace(TrimConfig(k=0.25), k=None).lossless
    assert replace(TrimConfig(k=0.25, policy="union"), k=None, keep=0.2).decider == "union"


@pytest.mark.parametrize("policy", ["union", "grid", "pyramid:0.5", "mean", "random:3", policies.Pyramid(), mine])
def test_a_policy_that_needs_a_budget_is_refused_without_one(policy):
    with pytest.raises(ConfigError, match=r"policy='.*' says which .*; give k or keep with it, or leave it out"):
        TrimConfig(policy=policy)


def test_a_policy_that_decides_alone_needs_no_budget():
    for policy in ("mass", "mass:0.5", policies.Pyramid(0.5, policies.Mass(0.9))):
        assert not TrimConfig(policy=policy).lossless


def test_options_in_a_dict_are_to_be_unpacked():
    with pytest.raises(ConfigError, match=re.escape("write trim(model, **{'k': 0.25})")):
        resolve({"k": 0.25}, {}, "trim(model")
    with pytest.raises(ConfigError, match=re.escape("got 0.25; did you mean trim(model, k=0.25)?")):
        resolve(0.25, {}, "trim(model")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("mmr:1.5", "balance=1.5 must be a weight from 0 to 1"),
        ("contribution:-1", "balance=-1.0 must be a weight from 0 to 1"),
        ("dpp:0", "width=0.0 must be above 0"),
    ],
)
def test_a_policys_number_has_its_limits(policy, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        TrimConfig(keep=0.5, policy=policy)


def test_keyword_arguments_are_the_fields():
    assert get_type_hints(TrimOptions) == get_type_hints(TrimConfig)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"k": 1.0}, True),
        ({"keep": 1.0}, True),
        ({"keep": 1}, False),
        ({"keep": 0.9}, False),
        ({"keep": 1.0, "policy": "pyramid"}, False),  # the last layers still lose some
    ],
)
def test_what_drops_nothing(options, expected):
    assert TrimConfig(**options).drops_nothing is expected
