"""Which trims a run compares: policies times how much they keep, with the first layer's cache trimmed or whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from crosstrim.asking.escalation import LOSSLESS as LOSSLESS
from crosstrim.asking.escalation import UNTRIMMED as UNTRIMMED
from crosstrim.asking.escalation import Budget, Escalation
from crosstrim.config import TrimConfig
from crosstrim.errors import ConfigError
from crosstrim.eval.defaults import KEEPS as KEEPS
from crosstrim.eval.defaults import ORACLE as ORACLE
from crosstrim.eval.defaults import POLICIES as POLICIES
from crosstrim.eval.defaults import SEEDS as SEEDS
from crosstrim.method import policies

FIRST_LAYERS = {"trimmed": (True,), "whole": (False,), "both": (True, False)}


@dataclass(frozen=True)
class Setting:
    """One trim of a run.

    Attributes:
        policy: its name, also where the config cannot say it: "oracle" and "lossless".
        config: how to trim. That of the oracle gets its policy batch by batch.
        escalation: when answers are made again.
    """

    policy: str
    config: TrimConfig
    escalation: Escalation | None = None

    @property
    def label(self) -> str:
        """What it is called, unlike every other setting."""
        return self._named(self.policy)

    @property
    def group(self) -> str:
        """What it is called together with the other seeds of the same draw."""
        return self._named(self._family)

    @property
    def curve(self) -> str:
        """What it is called together with those that only keep more or less."""
        name = self._family.partition(":")[0] + " (own share)" if self._decides_alone else self._family
        return name + self._suffix

    def to_dict(self) -> dict[str, Any]:
        """The setting as plain JSON types."""
        config = {**self.config.to_dict(), "policy": self.policy}
        told = {"label": self.label, "group": self.group, "curve": self.curve, "config": config}
        return told if self.escalation is None else {**told, "escalation": self.escalation.to_dict()}

    @property
    def _family(self) -> str:
        return "random" if self.policy.startswith("random:") else self.policy

    @property
    def _decides_alone(self) -> bool:
        return self.config.k is None and self.config.keep is None and self.policy != LOSSLESS

    @property
    def _suffix(self) -> str:
        whole = "" if self.config.trim_first_layer else ", whole first layer"
        packed = f", {self.config.kv_dtype} cache" if self.config.kv_dtype else ""
        again = "" if self.escalation is None else f", {self.escalation}"
        return whole + packed + (", merged" if self.config.merge else "") + again

    def _named(self, policy: str) -> str:
        config = self.config
        knobs = [f"{name}={value}" for name, value in (("k", config.k), ("keep", config.keep)) if value is not None]
        return " ".join([policy, *knobs]) + self._suffix


def expand(
    names: Sequence[str] = (),
    *,
    k: Sequence[float] = (),
    keep: Sequence[float | int] = (),
    lossless: bool = False,
    first_layer: str = "trimmed",
    kv_dtypes: Sequence[str | None] = (None,),
    merge: Sequence[bool] = (False,),
    seeds: int = SEEDS,
    escalate: float | None = None,
    escalate_to: Sequence[Budget] | Budget = UNTRIMMED,
    **options: Any,
) -> tuple[Setting, ...]:
    """Every policy with every `k` and every `keep`.

    Args:
        names: policies as `TrimConfig` takes them, and "oracle". "random" is drawn with every seed; a policy that
            decides by its own number ("mass:0.9") runs once, without `k` and `keep`. None: `POLICIES`.
        k: values of `k`.
        keep: values of `keep`. `KEEPS` when there is neither.
        lossless: whether to add the trim that only drops padding.
        first_layer: "trimmed", "whole" or "both": what becomes of the first cross-attention layer's own cache.
        kv_dtypes: values of `kv_dtype`; everything runs with each.
        merge: values of `merge`; everything that drops visible features runs with each.
        seeds: how many seeds "random" is drawn with.
        escalate: unsure answers are made again, as of `Escalation`; everything that drops visible features runs
            without and with it. None: none is made again.
        escalate_to: with what.
        **options: other fields of `TrimConfig`, the same for all.

    Returns:
        The settings, none twice.

    Raises:
        ConfigError: a value is out of range or unknown.
    """
    if first_layer not in FIRST_LAYERS:
        raise ConfigError(f"first_layer={first_layer!r} must be one of {', '.join(map(repr, FIRST_LAYERS))}.")
    if seeds < 1:
        raise ConfigError(f"seeds={seeds!r} must be at least 1.")
    for name in names:
        if name != ORACLE:
            policies.resolve(name, others=(ORACLE,))
    knobs: list[dict[str, Any]] = [{"k": value} for value in k] + [{"keep": value} for value in keep]
    knobs = knobs or [{"keep": value} for value in KEEPS]
    settings = []
    if lossless:
        settings = [Setting(LOSSLESS, TrimConfig.from_dict({"kv_dtype": one, **options})) for one in kv_dtypes]
    for name in names or POLICIES:
        for drawn in [f"random:{seed}" for seed in range(seeds)] if name == "random" else [name]:
            for trim_first_layer, kv_dtype, merged in product(FIRST_LAYERS[first_layer], kv_dtypes, merge):
                fields = {"trim_first_layer": trim_first_layer, "kv_dtype": kv_dtype, "merge": merged, **options}
                settings += [
                    Setting(drawn, _config(drawn, **fields, **knob))
                    for knob in (knobs if _needs_knob(drawn) else [{}])
                ]
    if escalate is not None:
        settings = [one for plain in settings for one in (plain, *_escalated(plain, escalate, escalate_to))]
    return tuple({setting.label: setting for setting in settings}.values())


def _escalated(setting: Setting, escalate: float, to: Sequence[Budget] | Budget) -> list[Setting]:
    if setting.policy == ORACLE or setting.config.drops_nothing:
        return []
    return [replace(setting, escalation=Escalation.of(setting.config, escalate, to))]


def _config(name: str, **fields: Any) -> TrimConfig:
    return TrimConfig(**fields) if name == ORACLE else TrimConfig(policy=name, **fields)


def _needs_knob(name: str) -> bool:
    return name == ORACLE or ":" not in name or not policies.voter(name).decides_alone
