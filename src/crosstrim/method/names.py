"""What options can be called, apart from the code that does it: a list of names needs no torch."""

from __future__ import annotations

POLICIES = ("contribution", "dpp", "grid", "mass", "mean", "mmr", "pyramid", "random", "union", "value")
"""The policies of `crosstrim.policies`."""

PAPER = "union"
"""What decides when nobody says what shall: with `k`, which is the paper's knob and defined by its rule ..."""

BUDGETED = "contribution"
"""... and with the exact budget `keep`, where the rule that lost least in our measurements does."""

ORACLE = "oracle"
"""A reference that `crosstrim eval --out` compares policies with. It looks ahead, so no trim can go by it."""

KV_DTYPES = ("int8", "fp8")
"""Eight-bit formats of a cache: symmetric integers, and float8 e4m3."""
