"""What to trim, as an engine is told it: in the model's config, or in the environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from crosstrim.config import TrimConfig
from crosstrim.errors import ConfigError


def read_options(
    overrides: Mapping[str, Any], environment: Mapping[str, str], others: Sequence[str] = ()
) -> dict[str, Any]:
    """The options that are given.

    Args:
        overrides: the object "crosstrim" of the model's config, as the engine lets one override it.
        environment: `CROSSTRIM_K`, `CROSSTRIM_KEEP`, `CROSSTRIM_POLICY`, and so on for each field of `TrimConfig`, as
            JSON or as plain text.
        others: further options that the engine has.

    Raises:
        ConfigError: an option is given in both places.
    """
    names = [*(field.name for field in fields(TrimConfig)), *others]
    given = {name: environment[_variable(name)] for name in names if _variable(name) in environment}
    twice = min(set(given) & set(overrides), default=None)
    if twice is not None:
        raise ConfigError(
            f"{twice} is given twice, by {_variable(twice)}={given[twice]} and in the model's config as "
            f"{overrides[twice]!r}; remove one."
        )
    return {**overrides, **{name: _parse(text) for name, text in given.items()}}


def config_for(engine: str, options: Mapping[str, Any]) -> TrimConfig:
    """The options as a config that an engine can carry out in which all layers share a request's slots.

    Raises:
        ConfigError: an option is unknown, out of range, or lets layers keep different features.
    """
    config = TrimConfig.from_dict(dict(options))
    reason = f"which cannot be had in {engine}, where all layers share the slots of a request"
    if not config.trim_first_layer:
        raise ConfigError(f"trim_first_layer=False keeps every feature in one layer, {reason}; leave it out.")
    if set(config.voters().shares(2)) != {1}:
        raise ConfigError(
            f"policy={config.policy!r} keeps less from layer to layer, {reason}; choose another policy."
        )
    return config


def _variable(name: str) -> str:
    return f"CROSSTRIM_{name.upper()}"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
