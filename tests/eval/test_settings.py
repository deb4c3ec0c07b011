"""What a run compares, from the options that name it."""

from __future__ import annotations

import json

import pytest

from crosstrim import TrimConfig
from crosstrim.errors import ConfigError
from crosstrim.eval import settings
from crosstrim.eval.settings import expand


def labels(*names, **options):
    return [setting.label for setting in expand(names, **options)]


def test_policies_times_knobs():
    assert labels("union", "mmr:0.3", k=[0.1, 0.25], keep=[0.5, 64]) == [
        *("union k=0.1", "union k=0.25", "union keep=0.5", "union keep=64"),
        *("mmr:0.3 k=0.1", "mmr:0.3 k=0.25", "mmr:0.3 keep=0.5", "mmr:0.3 keep=64"),
    ]


def test_the_first_layer():
    assert labels("grid", keep=[0.5], first_layer="both") == ["grid keep=0.5", "grid keep=0.5, whole first layer"]
    (whole,) = expand(["grid"], keep=[0.5], first_layer="whole")
    assert whole.config == TrimConfig(keep=0.5, policy="grid", trim_first_layer=False)


def test_the_caches_format():
    found = expand(["grid"], keep=[0.5], kv_dtypes=(None, "int8"), first_layer="both", lossless=True)
    assert [one.label for one in found] == [
        *("lossless", "lossless, int8 cache", "grid keep=0.5", "grid keep=0.5, int8 cache"),
        *("grid keep=0.5, whole first layer", "grid keep=0.5, whole first layer, int8 cache"),
    ]
    assert found[3].config == TrimConfig(keep=0.5, policy="grid", kv_dtype="int8")
    assert found[3].curve == "grid, int8 cache"
    with pytest.raises(ConfigError, match="kv_dtype='int4' must be one of"):
        expand(["grid"], kv_dtypes=("int4",))


def test_merged_beside_plain():
    found = expand(["grid"], keep=[0.5], kv_dtypes=("int8",), merge=(False, True), lossless=True)
    assert [one.label for one in found] == [
        *("lossless, int8 cache", "grid keep=0.5, int8 cache", "grid keep=0.5, int8 cache, merged"),
    ]
    assert found[2].config == TrimConfig(keep=0.5, policy="grid", kv_dtype="int8", merge=True)


def test_seeds_are_settings_of_one_group():
    drawn = expand(["random"], keep=[0.5], seeds=3)
    assert [one.label for one in drawn] == ["random:0 keep=0.5", "random:1 keep=0.5", "random:2 keep=0.5"]
    assert {one.group for one in drawn} == {"random keep=0.5"}
    assert {one.curve for one in drawn} == {"random"}
    assert labels("random:7", keep=[0.5]) == ["random:7 keep=0.5"]


def test_a_policy_that_decides_alone_runs_once():
    found = expand(["mass:0.9", "mass:0.5", "mass"], keep=[0.5, 0.2])
    assert [one.label for one in found] == ["mass:0.9", "mass:0.5", "mass keep=0.5", "mass keep=0.2"]
    assert [one.curve for one in found] == ["mass (own share)"] * 2 + ["mass"] * 2
    assert found[0].config == TrimConfig(policy="mass:0.9")


def test_the_oracle_is_named_in_json_only():
    (found,) = expand(["oracle"], keep=[0.5])
    assert found.config == TrimConfig(keep=0.5)
    assert found.to_dict()["config"]["policy"] == "oracle"
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_defaults():
    found = expand()
    assert [one.label for one in found if one.policy == "union"] == [f"union keep={keep}" for keep in settings.KEEPS]
    assert len({one.policy for one in found if one.policy.startswith("random:")}) == 3
    assert len(found) == len(settings.KEEPS) * (3 + 3)


def test_none_twice_and_lossless_first():
    assert labels("union", "union", keep=[0.5, 0.5], lossless=True) == ["lossless", "union keep=0.5"]
    assert expand(["union"], keep=[0.5], lossless=True)[0].config.lossless


def test_options_reach_every_config():
    assert {one.config.rating_rows for one in expand(rating_rows="last_turn", lossless=True)} == {"last_turn"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": ["onion"]}, "policy='onion' is unknown; there are .* mmr, oracle, pyramid"),
        ({"names": ["orcale"]}, "Did you mean 'oracle'"),
        ({"k": [2.0]}, "k=2.0 must be a share"),
        ({"keep": [0]}, "keep=0 as a count"),
        ({"first_layer": "half"}, "first_layer='half' must be one of 'trimmed', 'whole', 'both'"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ConfigError, match=words):
        expand(**options)
