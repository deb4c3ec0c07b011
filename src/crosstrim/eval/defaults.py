"""What an evaluation or an analysis does when nobody says otherwise; help pages name it, and need no torch."""

from __future__ import annotations

from crosstrim.method.names import ORACLE as ORACLE

POLICIES = ("union", "contribution", "grid", "random")
"""What runs when no policy is named: the paper's rule and ours, beside two that do not look at the question."""

KEEPS = (0.05, 0.1, 0.2, 0.35, 0.5)
"""How much is kept when neither `k` nor `keep` is given."""

SEEDS = 3
"""How often "random" draws."""

HELDOUT_TOKENS = 12
"""Where answers to the embedded questions are cut off."""

DATA_TOKENS = 32
"""Where answers to other questions are."""

QUESTIONS = 128
"""How many questions an analysis reads."""
