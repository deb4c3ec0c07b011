"""What to trim in SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crosstrim.config import TrimConfig
from crosstrim.engines.settings import config_for, read_options
from crosstrim.errors import ConfigError

_FREE_SLOTS = "free_slots"


@dataclass(frozen=True)
class Settings:
    """What to trim, and what becomes of the slots.

    Attributes:
        config: as for `crosstrim.trim`.
        free_slots: whether KV slots that turn out unneeded go back to the pool after the prompt. False keeps them
            allocated and unread, to compare with.
    """

    config: TrimConfig
    free_slots: bool = True

    @classmethod
    def read(cls, overrides: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
        """From `--json-model-override-args` and the environment; no option at all is the lossless tier.

        Raises:
            ConfigError: an option is unknown, out of range, given in both places, or cannot be had in SGLang.
        """
        options = read_options(overrides, environment, (_FREE_SLOTS,))
        free_slots = options.pop(_FREE_SLOTS, True)
        if not isinstance(free_slots, bool):
            raise ConfigError(f"{_FREE_SLOTS}={free_slots!r} must be true or false.")
        return cls(config_for("SGLang", options), free_slots)
