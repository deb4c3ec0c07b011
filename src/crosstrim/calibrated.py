"""A trim that `crosstrim calibrate` chose: it goes with the model that it was chosen on, and with no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crosstrim.config import TrimConfig
from crosstrim.errors import CalibrationError, ResultError
from crosstrim.files import read_json

FORMAT = 1
"""Of the file that a calibration writes."""


@dataclass(frozen=True)
class CalibratedConfig(TrimConfig):
    """A `TrimConfig` that knows what its promise was measured on. Made by `TrimConfig.from_calibration`.

    Attributes:
        path: of the calibration.
        made_with: its `model` and `compat`, and the options that it chose, as of `TrimConfig.to_dict`.
        escalate: where the promise holds for answers of which the unsure ones are made again untrimmed: those with a
            token of a lower probability than this. None where it holds for the trim alone.
    """

    path: str = field(default="", repr=False)
    made_with: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    escalate: float | None = None

    @property
    def first_attempt(self) -> CalibratedConfig:
        """The trim of the first attempt, for whoever makes unsure answers again."""
        return replace(self, escalate=None)

    def check(
        self, dtype: str, quantization: str | None, compat: Mapping[str, bool], fingerprint: Callable[[], str]
    ) -> None:
        """Refuse a model, or options, that the promise was not measured with.

        Args:
            dtype: of the model.
            quantization: how its weights are quantised; None: not at all.
            compat: by repair, whether it is on.
            fingerprint: of the model's weights; asked last.

        Raises:
            CalibrationError: it names what differs.
        """
        if self.escalate is not None:
            raise CalibrationError(
                f"{self.path} holds where answers with a token of a lower probability than {self.escalate} are made "
                "again, which a trim alone does not do; ask through crosstrim.Session, or by ask, batch or serve "
                "with --calibrated."
            )
        here, there = self.to_dict(), self.made_with["config"]
        for name in here:
            if here[name] != there.get(name):
                raise self._refusal(name, there.get(name), here[name], "take the config as it is, or calibrate anew")
        model = self.made_with["model"]
        if dtype != model["dtype"]:
            raise self._refusal(
                "dtype", model["dtype"], dtype, f"load the model in {model['dtype']}, or calibrate anew"
            )
        if quantization != (quantised := model.get("quantization")):
            remedy = "load the model without quantization" if quantised is None else f"quantise it by {quantised}"
            raise self._refusal(
                "quantization", quantised or "none", quantization or "none", f"{remedy}, or calibrate anew"
            )
        for name in {**self.made_with["compat"], **compat}:
            before, now = ("on" if one.get(name) else "off" for one in (self.made_with["compat"], compat))
            if before != now:
                raise self._refusal(f"repair {name}", before, now, "repair the model alike, or calibrate anew")
        if fingerprint() != model["sha256_of_samples"]:
            raise self._refusal("weights", f"those of {model['name']}", "others", "calibrate this model")

    def _refusal(self, what: str, there: object, here: object, remedy: str) -> CalibrationError:
        return CalibrationError(
            f"{self.path} does not hold for this trim: {what} ({there} there, {here} here); {remedy}."
        )


def read(path: Path) -> dict[str, Any]:
    """Read what `crosstrim calibrate` wrote.

    Raises:
        ResultError: it is no calibration, cannot be read, or is of another format.
    """
    found = read_json(path)
    if not isinstance(found, dict) or "calibration" not in found or "curve" not in found:
        raise ResultError(f"{path} is no result of crosstrim calibrate.")
    if found.get("format") != FORMAT:
        raise ResultError(
            f"{path} has format {found.get('format')!r}, this crosstrim reads {FORMAT}; calibrate anew."
        )
    return found


def config_of(path: Path) -> CalibratedConfig:
    """The trim that a calibration chose.

    Raises:
        CalibrationError: it chose none.
        ResultError: as of `read`.
        ConfigError: its options are not of this crosstrim.
    """
    found = read(path)
    if found["chosen"] is None:
        raise CalibrationError(f"{path} chose no budget: {found['refusal']}")
    plain = TrimConfig.from_dict(found["chosen"]["config"])  # which refuses what it does not know
    # An option that is younger than the file had its default.
    made_with = {"config": plain.to_dict(), "model": found["model"], "compat": found["compat"]}
    escalate = found["chosen"].get("escalate")
    return CalibratedConfig(**plain.options(), path=str(path), made_with=made_with, escalate=escalate)
