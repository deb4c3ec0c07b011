"""What to trim and how: one small frozen dataclass that travels through JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

from crosstrim.errors import ConfigError
from crosstrim.method import amount, policies
from crosstrim.method.names import KV_DTYPES

CONFIG_VERSION = 1


@dataclass(frozen=True)
class TrimConfig:
    """How many image features to keep, and which.

    Give `k`, the paper's knob, or `keep`, an exact budget, or neither. Neither is the lossless tier: only
    features that no text row may see (padding tiles) are dropped, and answers stay the same.

    Attributes:
        k: every head of the first cross-attention layer keeps this share (0 to 1] of an image's features, and
            the union over heads stays (the paper's rule; how much that is depends on the input).
        keep: exactly this much of each image stays: a share (a float in (0, 1]) of its visible features, or a
            number of features (an int >= 1), rounded up, never more than are visible. Ours.
        policy: which features come first: a name of `crosstrim.policies`, with its number after a colon where it
            takes one ("mass:0.9"), or a callable with the same interface. None means "union", the paper's, with
            `k`, and "contribution", ours, with `keep`; with neither, only a policy that decides how much stays
            ("mass:0.9") may be given.
        k_base: what `k` is a share of: "visible" features, or "all", padding included. Ours.
        rating_rows: which text rows score the features: "all" that see one, or only those of the "last_turn",
            after the last image or the last user turn. Ours.
        trim_first_layer: whether the first cross-attention layer's own cache shrinks too, once it has scored.
            It attends to everything at prefill either way. Ours.
        user_turn_ids: token ids that open a user turn, for rating_rows="last_turn". None takes Llama-3.2's own
            when the model has that vocabulary, and otherwise goes by the last image alone.
        kv_dtype: how the kept keys and values are held in the cache: "int8" or "fp8", with a scale per feature and
            head, or None for the model's own dtype. Ours.
        merge: whether the later layers read what is dropped folded into what stays. The caches are as large as
            without. Ours.
    """

    k: float | None = None
    keep: float | int | None = None
    policy: str | policies.Voter | None = None
    k_base: Literal["visible", "all"] = "visible"
    rating_rows: Literal["all", "last_turn"] = "all"
    trim_first_layer: bool = True
    user_turn_ids: tuple[int, ...] | None = None
    kv_dtype: Literal["int8", "fp8"] | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        k, keep = amount.checked(self.k, self.keep, self.k_base, ConfigError)
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "keep", keep)
        _check_choice("rating_rows", self.rating_rows, ("all", "last_turn"))
        _check_choice("kv_dtype", self.kv_dtype, (None, *KV_DTYPES))
        for name in ("trim_first_layer", "merge"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name}={value!r} must be True or False.")
        if self.user_turn_ids is not None:
            object.__setattr__(self, "user_turn_ids", tuple(self.user_turn_ids))
        decides_alone = self.voters().decides_alone
        if self.policy is not None and k is None and keep is None and not decides_alone:
            raise ConfigError(
                f"policy={policies.name_of(self.policy)!r} says which features come first, not how many stay; give k "
                "or keep with it, or leave it out to drop padding alone."
            )

    @property
    def lossless(self) -> bool:
        """Whether only invisible features go."""
        return self.k is None and self.keep is None and self.policy is None

    @property
    def count_depends_on_prompt(self) -> bool:
        """Whether how much stays is only known once the features were scored."""
        return not self.lossless and self.keep is None

    @property
    def drops_nothing(self) -> bool:
        """Whether everything visible stays in every layer, by whatever rule."""
        everything = self.k == 1 or (self.keep == 1 and isinstance(self.keep, float))
        return self.lossless or (everything and set(self.voters().shares(2)) == {1})

    @property
    def decider(self) -> str | policies.Voter:
        """`policy`, or what its absence means. Nobody is asked where the trim is lossless."""
        if self.policy is not None:
            return self.policy
        return policies.PAPER if self.keep is None else policies.BUDGETED

    def voters(self) -> policies.Policy:
        """The policy itself, where `decider` may be its name."""
        return policies.voter(self.decider)

    def options(self) -> dict[str, Any]:
        """The fields by name, as `TrimConfig` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(TrimConfig)}

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types, with a format version.

        It names the policy that decides, also where `policy` is None, and None where nothing is to be decided. A
        policy of your own is named by where its code is found, which `from_dict` cannot follow.
        """
        values = self.options()
        values["policy"] = None if self.lossless else policies.name_of(self.decider)
        if self.user_turn_ids is not None:
            values["user_turn_ids"] = list(self.user_turn_ids)
        return {"version": CONFIG_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrimConfig:
        """Rebuild a config from `to_dict`.

        Raises:
            ConfigError: a key is unknown, a value out of range, the policy not one of crosstrim's, or the format
                newer than this crosstrim.
        """
        values = dict(values)
        version = values.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise ConfigError(
                f"this config has format version {version!r}, this crosstrim reads {CONFIG_VERSION}; "
                "use the crosstrim that wrote it."
            )
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}; TrimConfig has {', '.join(sorted(known))}.")
        return cls(**values)

    @classmethod
    def from_calibration(cls, path: str | os.PathLike[str]) -> TrimConfig:
        """The trim that `crosstrim calibrate` chose, with what its promise was measured on.

        `crosstrim.trim` refuses to put it on other weights, in another dtype, with other repairs, or with options
        that were changed since.

        Args:
            path: of the file that the calibration wrote.

        Raises:
            CalibrationError: it chose no budget.
            ResultError: the file is no calibration, or cannot be read.
        """
        from crosstrim.calibrated import config_of  # which builds on this module

        return config_of(Path(path))


class TrimOptions(TypedDict, total=False):
    """The fields of `TrimConfig` as keyword arguments, so that editors and type checkers know them."""

    k: float | None
    keep: float | int | None
    policy: str | policies.Voter | None
    k_base: Literal["visible", "all"]
    rating_rows: Literal["all", "last_turn"]
    trim_first_layer: bool
    user_turn_ids: tuple[int, ...] | None
    kv_dtype: Literal["int8", "fp8"] | None
    merge: bool


def resolve(config: TrimConfig | None, options: Mapping[str, Any], call: str) -> TrimConfig:
    """The config that a caller gave as an object or as options.

    Args:
        config: the object, or None.
        options: fields of `TrimConfig`.
        call: the beginning of the call that took them, such as "trim(model", for the message.

    Raises:
        ConfigError: both were given, or `config` is none, or an option is out of range or unknown.
    """
    if config is not None and options:
        raise ConfigError(
            f"give either a TrimConfig or options, not both (got {', '.join(sorted(options))} as well)."
        )
    if isinstance(config, Mapping):
        raise ConfigError(f"expected a TrimConfig, got {config!r}; to give its options, write {call}, **{config!r}).")
    if config is not None and not isinstance(config, TrimConfig):
        raise ConfigError(f"expected a TrimConfig, got {config!r}; did you mean {call}, k={config!r})?")
    return config or TrimConfig.from_dict(options)


def _check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")
