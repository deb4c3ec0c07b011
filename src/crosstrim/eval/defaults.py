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

RISK = 0.02
"""How many of the answers may change, as a share, where a calibration is not told."""

CONFIDENCE = 0.95
"""How sure it is to be of that."""

CALIBRATED_ON = 600
"""How many questions it draws at most."""

LOSSES = ("answer", "wrong")
"""What it counts: answers that are not the untrimmed model's, or right ones that became wrong."""
