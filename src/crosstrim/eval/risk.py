"""Exact statements about a risk from how often it was met: binomial tails, intervals, and a sequence of tests.

A budget's risk is the chance that trimming to it changes an answer. Of `count` questions drawn independently, the
number of changed answers is binomial. Everything here follows from that alone: no approximation, no prior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import takewhile
from math import ceil, exp, log1p

import numpy as np
from numpy.typing import NDArray

from crosstrim.errors import ConfigError

_MANY = 1_000_000
"""Draws that nobody makes."""


def tail(changed: int, count: int, risk: float) -> float:
    """P(X <= changed) for X binomial of `count` draws at `risk`, exact to rounding.

    Args:
        changed: below 0 the tail is empty, from `count` on it is everything.
        count: draws, at least 1.
        risk: in [0, 1].
    """
    if changed < 0:
        return 0.0
    if changed >= count or risk == 0:
        return 1.0
    if risk == 1:
        return 0.0
    if changed == 0:
        return exp(count * log1p(-risk))  # also of more draws than there is memory for
    weights = _weights(count, risk)
    return float(weights[: changed + 1].sum() / weights.sum())


def _weights(count: int, risk: float) -> NDArray[np.float64]:
    """[count + 1]: the binomial's probabilities over that of its mode, so that no term of weight is lost."""
    mode = min(count, int((count + 1) * risk))
    up, down = np.arange(mode, count), np.arange(mode, 0, -1)
    odds = risk / (1 - risk)
    above = np.cumprod((count - up) / (up + 1) * odds)
    below = np.cumprod(down / (count - down + 1) / odds)
    return np.concatenate([below[::-1], [1.0], above])


def upper(changed: int, count: int, error: float) -> float:
    """The largest risk under which so few changes are not rarer than `error`: Clopper and Pearson's upper bound.

    `upper(c, n, error) <= risk` and `tail(c, n, risk) <= error` say the same.

    Returns:
        The bound, of the two neighbouring numbers the one that promises less.
    """
    if changed >= count:
        return 1.0
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if tail(changed, count, middle) <= error else (middle, high)
    return high


def interval(fewest: int, most: int, count: int, confidence: float) -> tuple[float, float]:
    """Clopper and Pearson's two-sided interval of a risk.

    Args:
        fewest: changes there are at least, of all `count` draws.
        most: changes there are at most; more than `fewest` where not all draws were looked at.
        count: draws.
        confidence: in (0, 1).
    """
    error = (1 - confidence) / 2
    return max(0.0, 1 - upper(count - fewest, count, error)), upper(most, count, error)


@lru_cache(maxsize=64)
def allowed(count: int, risk: float, confidence: float) -> int:
    """The most changes with which `count` draws support that the risk is at most `risk`; -1 where none do."""
    changed = -1
    while tail(changed + 1, count, risk) <= 1 - confidence:
        changed += 1
    return changed


def needed(risk: float, confidence: float, changed: int = 0) -> int:
    """The fewest draws with which so many changes support the claim: 59 where none changed, at 0.05 and 0.95."""
    return _fewest(lambda count: tail(changed, count, risk) <= 1 - confidence)


def needed_at(rate: float, risk: float, confidence: float) -> int | None:
    """About how many draws support the claim if changes go on at `rate`; None where none do, or over a million."""

    def supports(count: int) -> bool:
        return tail(ceil(rate * count), count, risk) <= 1 - confidence

    return _fewest(supports) if rate < risk and supports(_MANY) else None


def _fewest(enough: Callable[[int], bool]) -> int:
    """The least number that is enough, where more always is; elsewhere one that is, just above one that is not."""
    high = 1
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def certified(changes: Sequence[int], count: int, risk: float, confidence: float) -> int:
    """Learn then test, by fixed-sequence testing (Angelopoulos et al., arXiv 2110.01052).

    Each hypothesis "the risk is above `risk`" is tested at the full error `1 - confidence`, in an order that was
    fixed beforehand, until one is not rejected. So the chance that any of those rejected is true is at most that
    error, however many there are.

    Args:
        changes: by budget, in the order of the tests: the largest budget first.
        count: draws.
        risk: that is allowed.
        confidence: in (0, 1).

    Returns:
        How many budgets, from the first on, are certified.
    """
    most = allowed(count, risk, confidence)
    return sum(1 for _ in takewhile(lambda changed: changed <= most, changes))


def check_levels(risk: float, confidence: float) -> None:
    """Refuse what is no risk or no confidence.

    Raises:
        ConfigError: one is not strictly between 0 and 1.
    """
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(f"{name}={value!r} must lie between 0 and 1, as in 0.02 and 0.95.")
