"""The tables of docs/scaling.md: how many requests fit on which cards, computed."""

from __future__ import annotations

from typing import Any

from crosstrim import capacity
from crosstrim.eval import kv_table
from crosstrim.memory import SHAPES, ModelShape

GIGABYTE = 10**9
CARDS = (24, 48, 80, 141)
COUNTS = {"11b": (1, 2), "90b": (1, 2, 4, 8)}
TEXT_TOKENS = 512
ENGINES: dict[str, dict[str, Any]] = {"transformers": {}, "vLLM": {"block": 16}, "SGLang": {"one_row": True}}

_PAGE = """\
Computed, not measured. One picture and {text} text tokens a request, bfloat16, {reserve:.0%} of every card left free.
*Weights* are those on each card; with several cards the model is divided over them by tensor parallelism.

{tables}

What is not in a table cannot hold the weights.
"""


def part() -> str:
    sections = []
    for name, shape in SHAPES.items():
        for engine, options in ENGINES.items():
            sections.append(f"### {name.upper()} in {engine}\n\n{_table(name, shape, options)}")
    tables = "\n\n".join(sections)
    return _PAGE.format(text=TEXT_TOKENS, reserve=capacity.RESERVE, tables=tables)


def _table(name: str, shape: ModelShape, options: dict[str, Any]) -> str:
    tiers = kv_table.tiers(shape)
    header = ["cards", "weights", *[_title(tier) for tier in tiers]]
    rows = [_row(name, shape, options, cards, size) for cards in COUNTS[name] for size in CARDS]
    lines = ["| " + " | ".join(row) + " |" for row in [header, *filter(None, rows)]]
    return "\n".join([lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]])


def _title(tier: str) -> str:
    return {"one tile, padding gone": "one tile, lossless"}.get(tier, tier)


def _row(name: str, shape: ModelShape, options: dict[str, Any], cards: int, size: int) -> list[str] | None:
    vision = capacity.VISION_PARAMETERS[name]
    fits = [
        capacity.requests_in_flight(shape, vision, size * GIGABYTE, cards, features, TEXT_TOKENS, **options)
        for features in kv_table.tiers(shape).values()
    ]
    if fits[0] is None:
        return None
    weights = capacity.weight_bytes_per_card(shape, vision, cards) / GIGABYTE
    return [f"{cards} x {size} GB", f"{weights:.1f} GB", *map(str, fits)]
