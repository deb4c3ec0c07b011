"""What to trim, as an engine is told it: in the model's config, or in the environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

from crosstrim.config import TrimConfig
from crosstrim.errors import ConfigError, EngineError


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


def config_for(engine: str, options: Mapping[str, Any], *, count_beforehand: bool = False) -> TrimConfig:
    """The options as a config that an engine can carry out in which all layers share a request's slots.

    Args:
        engine: its name.
        options: as `read_options` gives them.
        count_beforehand: whether the engine must know how much stays before it computes the prompt.

    Raises:
        ConfigError: an option is unknown, out of range, lets layers keep different features, needs another cache or
            attention than the engine's, or lets the prompt decide how many stay although the engine must know that
            beforehand.
    """
    config = TrimConfig.from_dict(dict(options))
    reason = f"which cannot be had in {engine}, where all layers share the slots of a request"
    if not config.trim_first_layer:
        raise ConfigError(f"trim_first_layer=False keeps every feature in one layer, {reason}; leave it out.")
    if set(config.voters().shares(2)) != {1}:
        raise ConfigError(
            f"policy={config.policy!r} keeps less from layer to layer, {reason}; choose another policy."
        )
    if config.kv_dtype is not None:
        raise ConfigError(
            f"kv_dtype={config.kv_dtype!r} cannot be had in {engine}, which holds the cache; leave it out."
        )
    if config.merge:
        raise ConfigError(
            f"merge=True cannot be had in {engine}, whose attention adds nothing to its logits; leave it out."
        )
    if count_beforehand and config.count_depends_on_prompt:
        given = f"policy={config.policy!r}" if config.k is None else f"k={config.k!r}"
        raise ConfigError(
            f"{given} lets the prompt decide how much stays, and {engine} must know it before, to give a request its "
            "memory; give keep=, such as keep=0.5. `crosstrim calibrate` finds one for your questions."
        )
    return config


def given(config: TrimConfig) -> dict[str, Any]:
    """The options of a config that say anything, to be handed to an engine as JSON."""
    defaults = {field.name: field.default for field in fields(TrimConfig)}
    return {name: value for name, value in config.to_dict().items() if value != defaults.get(name)}


def check_values(engine: str, found: object, required: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse an engine that is set up in another way than trimming was made for.

    Args:
        engine: its name.
        found: its settings.
        required: by attribute, "model.dtype" for one of an attribute: its value, and what makes the engine have it.

    Raises:
        EngineError: an attribute has another value.
    """
    for name, (value, remedy) in required.items():
        if (is_now := attrgetter(name)(found)) != value:
            raise EngineError(f"crosstrim in {engine} was not made for {name}={is_now!r}; start it with {remedy}.")


def _variable(name: str) -> str:
    return f"CROSSTRIM_{name.upper()}"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
