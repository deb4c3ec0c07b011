"""What to trim in SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crosstrim.config import TrimConfig
from crosstrim.engines.settings import config_for, read_options
from crosstrim.errors import ConfigError

_FREE_SLOTS = "free_slots"
_ALLOW = "allow_untested_backend"


@dataclass(frozen=True)
class Settings:
    """What to trim, and what becomes of the slots.

    Attributes:
        config: as for `crosstrim.trim`.
        free_slots: whether KV slots that turn out unneeded go back to the pool after the prompt. False keeps them
            allocated and unread, to compare with.
        allow_untested_backend: whether attention backends may be used that should work but could not be tested.
    """

    config: TrimConfig
    free_slots: bool = True
    allow_untested_backend: bool = False

    @classmethod
    def read(cls, overrides: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
        """From `--json-model-override-args` and the environment; no option at all is the lossless tier.

        Raises:
            ConfigError: an option is unknown, out of range, given in both places, or cannot be had in SGLang.
        """
        options = read_options(overrides, environment, (_FREE_SLOTS, _ALLOW))
        switches = {name: options.pop(name, default) for name, default in ((_FREE_SLOTS, True), (_ALLOW, False))}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ConfigError(f"{name}={value!r} must be true or false.")
        return cls(config_for("SGLang", options), **switches)
