"""From answers to numbers: per setting, over all questions and for each kind of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosstrim.eval.metrics import Estimate, bootstrap
from crosstrim.eval.settings import ORACLE, UNTRIMMED, Setting

Row = dict[str, Any]

_COLUMNS = ("accuracy", "accuracy_change", "unchanged", "kl", "kept_fraction", "held")
_BANDED = ("accuracy", "accuracy_change", "unchanged")
_TOLD = _COLUMNS[:-1]


def summarise(
    items: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Mapping[str, Any]],
    settings: Sequence[Setting],
    layers: int,
    kv_share: Callable[[str | None], float] = lambda kv_dtype: 1.0,
) -> list[Row]:
    """One row per setting, the seeds of a random draw averaged question by question.

    Args:
        items: with `kind` and `visible`.
        predictions: of `sweep.collected`.
        settings: that were run.
        layers: cross-attention layers of the model.
        kv_share: bytes that a `kv_dtype` needs, as a share of those in the model's own.

    Returns:
        The untrimmed model's row first, each with `group`, `curve`, `trim_first_layer`, `seeds`, `overall` and
        `kinds`.
    """
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.group, []).append(setting)
    rows: list[Row] = [{"group": UNTRIMMED, "curve": UNTRIMMED, "trim_first_layer": False, "seeds": 1}]
    rows += [
        {
            "group": group,
            "curve": members[0].curve,
            "trim_first_layer": members[0].config.trim_first_layer,
            "seeds": len(members),
        }
        for group, members in groups.items()
    ]
    labels = [[UNTRIMMED], *([setting.label for setting in members] for members in groups.values())]
    values = np.stack([_values(items, predictions, of_group) for of_group in labels], axis=1)
    kinds = np.array([item["kind"] for item in items])
    kv_shares = [1.0, *(kv_share(members[0].config.kv_dtype) for members in groups.values())]
    for row, cell in zip(rows, _cells(values, rows, layers, kv_shares), strict=True):
        row["overall"] = cell
        row["kinds"] = {}
    for kind in dict.fromkeys(kinds.tolist()):
        for row, cell in zip(rows, _cells(values[kinds == kind], rows, layers, kv_shares), strict=True):
            row["kinds"][kind] = cell
    best = front(rows)
    return [{**row, "pareto": row["group"] in best} for row in rows]


def held_fraction(prediction: Mapping[str, Any], visible: Sequence[int] | NDArray[np.float64]) -> NDArray[np.float64]:
    """[questions]: kept over visible features, mean over the layers, which may read less one after the other."""
    kept = np.array(prediction.get("kept", visible), dtype=float)
    layers = np.array(prediction.get("layers", kept[:, None]), dtype=float)
    return np.asarray(layers.mean(1) / np.asarray(visible), dtype=np.float64)


def front(rows: Sequence[Row]) -> set[str]:
    """The groups that no other beats: at least as accurate with no more cache, and better in one of the two.

    The oracle, which cannot be had, and the untrimmed model do not compete.
    """
    rows = [row for row in rows if row["curve"].partition(",")[0] not in (ORACLE, UNTRIMMED)]
    points = {row["group"]: (row["overall"]["cache_fraction"], -row["overall"]["accuracy"]["mean"]) for row in rows}
    return {
        group
        for group, (cost, error) in points.items()
        if not any(other != (cost, error) and other[0] <= cost and other[1] <= error for other in points.values())
    }


def _values(
    items: Sequence[Mapping[str, Any]], predictions: Mapping[str, Mapping[str, Any]], labels: Sequence[str]
) -> NDArray[np.float64]:
    """[questions, columns]: the mean over the seeds."""
    untrimmed = predictions[UNTRIMMED]
    was_right = np.array(untrimmed["right"], dtype=float)
    visible = np.array([item["visible"] for item in items], dtype=float)
    draws = []
    for label in labels:
        prediction = predictions[label]
        right = np.array(prediction["right"], dtype=float)
        unchanged = [one == other for one, other in zip(prediction["answer"], untrimmed["answer"], strict=True)]
        loss = np.array(prediction.get("kl", np.zeros(len(items))))
        kept, held = np.array(prediction.get("kept", visible)) / visible, held_fraction(prediction, visible)
        draws.append(np.stack([right, right - was_right, np.array(unchanged, dtype=float), loss, kept, held], axis=1))
    return np.asarray(np.mean(draws, axis=0), dtype=np.float64)


def _cells(
    values: NDArray[np.float64], rows: Sequence[Row], layers: int, kv_shares: Sequence[float]
) -> list[dict[str, Any]]:
    """Per setting, the numbers over some questions.

    Args:
        values: [questions, settings, columns].
        rows: the settings.
        layers: cross-attention layers of the model.
        kv_shares: of the settings.
    """
    estimates = bootstrap(values.reshape(len(values), -1))
    cells = []
    for index, row in enumerate(rows):
        of_row = estimates[index * len(_COLUMNS) : (index + 1) * len(_COLUMNS)]
        numbers: dict[str, Estimate] = dict(zip(_COLUMNS, of_row, strict=True))
        kept, held = numbers["kept_fraction"].mean, numbers["held"].mean
        back = 0.0 if row["trim_first_layer"] else 1 - kept
        cells.append(
            {
                "questions": len(values),
                **{
                    name: numbers[name].to_dict() if name in _BANDED else numbers[name].to_dict()["mean"]
                    for name in _TOLD
                },
                "cache_fraction": float(f"{kv_shares[index] * (held + back / layers):.6g}"),
            }
        )
    return cells
