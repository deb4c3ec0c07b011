"""Definitions of statistics, written out with loops and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction


def top(scores, count):
    return set(sorted(range(len(scores)), key=lambda n: (-scores[n], n))[:count])


def ranks(scores):
    """Mean of the places that equal scores take."""
    ordered = sorted(scores)
    places = {value: [place for place, one in enumerate(ordered) if one == value] for value in scores}
    return [Fraction(sum(places[value]), len(places[value])) for value in scores]


def pearson(a, b):
    mean_a, mean_b = sum(a) / Fraction(len(a)), sum(b) / Fraction(len(b))
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return float(covariance) / math.sqrt(spread) if spread else 0.0
