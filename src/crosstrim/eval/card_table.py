"""What fits on one card: weights in each precision, and requests beside them. Computed, not measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from crosstrim import capacity
from crosstrim.data.pages import Table
from crosstrim.eval import kv_table
from crosstrim.memory import SHAPES, ModelShape
from crosstrim.models import mllama, quantised

GIGABYTE = 10**9
TEXT_TOKENS = 512
"""Of a request, prompt and answer together."""

_PRECISIONS = {"bf16": None, "int8 or fp8": "int8", "nf4": "nf4"}
_NO = "-"


def of_shape(name: str, gigabytes: float) -> dict[str, Any]:
    """What fits of a model that is known by name.

    Args:
        name: one of `crosstrim.memory.SHAPES`.
        gigabytes: of the card's memory, 10^9 bytes each.

    Returns:
        As plain JSON types: `model`, `card_gb`, `reserve` (the share of the card that is left free), `text_tokens` of
        a request beside its one picture, and `rows`, each with `weights` (in what precision), `weight_bytes`, and
        `in_flight`: requests by tier, each None where the weights alone do not fit.
    """
    return _compute(SHAPES[name], capacity.MATRIX_PARAMETERS[name], gigabytes)


def of_config(config: Any, name: str, gigabytes: float) -> dict[str, Any]:
    """What fits of the model of a configuration, as `of_shape` says it.

    Args:
        config: an `MllamaConfig`.
        name: what to call the model.
        gigabytes: of the card's memory, 10^9 bytes each.
    """
    return _compute(mllama.shape_of(config, name), quantised.matrix_parameters(config), gigabytes)


def table(found: dict[str, Any]) -> Table:
    """The result of `of_shape` for people."""
    rows = found["rows"]
    cells = [
        (
            row["weights"],
            f"{row['weight_bytes'] / GIGABYTE:.1f} GB",
            *(_NO if count is None else str(count) for count in row["in_flight"].values()),
        )
        for row in rows
    ]
    return Table(
        title=f"Pictures in flight: {found['model']} on a card of {found['card_gb']:g} GB",
        header=("weights", "take", *rows[0]["in_flight"]),
        rows=tuple(cells),
        note=f"Computed, not measured: requests of one picture and {found['text_tokens']} text tokens, a bfloat16 KV "
        f"cache, {found['reserve']:.0%} of the card left free. {_NO}: the weights alone do not fit.",
    )


def _compute(shape: ModelShape, matrix_parameters: int, gigabytes: float) -> dict[str, Any]:
    """Whatever is not quantised, and the KV cache, is in bfloat16, however the checkpoint is stored."""
    shape, rows = replace(shape, bytes_per_element=2), []
    for name, quantization in _PRECISIONS.items():
        weights = capacity.weight_bytes(shape, matrix_parameters, quantization)
        in_flight = {
            tier: capacity.requests_in_flight(shape, weights, gigabytes * GIGABYTE, 1, features, TEXT_TOKENS)
            for tier, features in kv_table.tiers(shape).items()
        }
        rows.append({"weights": name, "weight_bytes": round(weights), "in_flight": in_flight})
    facts = {"model": shape.name, "card_gb": gigabytes, "reserve": capacity.RESERVE, "text_tokens": TEXT_TOKENS}
    return {**facts, "rows": rows}
