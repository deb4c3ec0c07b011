"""The tables of docs/scaling.md: how many requests fit on which cards, computed."""

from __future__ import annotations

from typing import Any

from crosstrim import capacity
from crosstrim.eval import card_table, kv_table
from crosstrim.eval.card_table import GIGABYTE, TEXT_TOKENS
from crosstrim.memory import SHAPES, ModelShape

SINGLE = (12, 16, 24, 48, 80)
CARDS = (24, 48, 80, 141)
COUNTS = {"11b": (1, 2), "90b": (1, 2, 4, 8)}
ENGINES: dict[str, dict[str, Any]] = {"transformers": {}, "vLLM": {"block": 16}, "SGLang": {"one_row": True}}

_PAGE = """\
Computed, not measured. One picture and {text} text tokens a request, a bfloat16 KV cache, {reserve:.0%} of every card
left free.

## On one card, by precision

In transformers. *Weights* are held so where quantising makes them smaller, and in bfloat16 elsewhere
([which](#weights-in-four-or-eight-bits)). `crosstrim doctor --card 24` prints this for a card of any size, and with
`--model` for any Llama-3.2-Vision.

{precisions}

## On several cards, in bfloat16

*Weights* are those on each card; with several cards the model is divided over them by tensor parallelism.

{tables}

What is not in a table cannot hold the weights.
"""


def part() -> str:
    sections = []
    for name, shape in SHAPES.items():
        for engine, options in ENGINES.items():
            sections.append(f"### {name.upper()} in {engine}\n\n{_table(name, shape, options)}")
    return _PAGE.format(
        text=TEXT_TOKENS,
        reserve=capacity.RESERVE,
        precisions="\n\n".join(f"### {name.upper()} on one card\n\n{_on_one_card(name)}" for name in SHAPES),
        tables="\n\n".join(sections),
    )


def _on_one_card(name: str) -> str:
    tables = [card_table.of_shape(name, size) for size in SINGLE]
    header = ["card", "weights", "", *map(_title, kv_table.tiers(SHAPES[name]))]
    rows = [
        [
            f"{table['card_gb']} GB",
            row["weights"],
            f"{row['weight_bytes'] / GIGABYTE:.1f} GB",
            *map(str, row["in_flight"].values()),
        ]
        for table in tables
        for row in table["rows"]
        if None not in row["in_flight"].values()
    ]
    return _lines(header, rows, left=2)


def _table(name: str, shape: ModelShape, options: dict[str, Any]) -> str:
    tiers = kv_table.tiers(shape)
    header = ["cards", "weights", *[_title(tier) for tier in tiers]]
    rows = [_row(name, shape, options, cards, size) for cards in COUNTS[name] for size in CARDS]
    return _lines(header, list(filter(None, rows)), left=1)


def _lines(header: list[str], rows: list[list[str]], left: int) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---" * left + "|---:" * (len(header) - left) + "|", *lines[1:]])


def _title(tier: str) -> str:
    return {"one tile, padding gone": "one tile, lossless"}.get(tier, tier)


def _row(name: str, shape: ModelShape, options: dict[str, Any], cards: int, size: int) -> list[str] | None:
    weights = capacity.weight_bytes_per_card(shape, capacity.VISION_PARAMETERS[name], cards)
    fits = [
        capacity.requests_in_flight(shape, weights, size * GIGABYTE, cards, features, TEXT_TOKENS, **options)
        for features in kv_table.tiers(shape).values()
    ]
    if fits[0] is None:
        return None
    return [f"{cards} x {size} GB", f"{weights / GIGABYTE:.1f} GB", *map(str, fits)]
