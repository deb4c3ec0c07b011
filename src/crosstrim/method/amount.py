"""What `k`, `keep` and `k_base` may be: one check for `TrimConfig` and `select`, which say how much stays."""

from __future__ import annotations

import numbers

from crosstrim.errors import CrosstrimError


def checked(
    k: object, keep: object, k_base: object, refuse: type[CrosstrimError]
) -> tuple[float | None, float | int | None]:
    """`k` and `keep` as plain numbers.

    Args:
        k: None, or a share above 0 and at most 1.
        keep: None, or such a share, or a whole number of at least 1. numpy's numbers are as good as Python's.
        k_base: "visible" or "all".
        refuse: the error to raise.

    Returns:
        `k` as a float and `keep` as a float (a share) or an int (a count), None where they were.

    Raises:
        CrosstrimError: of the type `refuse`; a value is out of range, or both `k` and `keep` are given.
    """
    if k is not None and keep is not None:
        raise refuse(f"k={k!r} and keep={keep!r} are two ways to say how much stays; give one of them.")
    if k_base not in ("visible", "all"):
        raise refuse(f"k_base={k_base!r} must be one of 'visible', 'all'.")
    share, budget = _plain(k), _plain(keep)
    if k is not None and not _is_share(share):
        raise refuse(f"k={k!r} must be a share above 0 and at most 1, such as k=0.25.")
    if isinstance(budget, int) and budget < 1:
        raise refuse(f"keep={keep!r} as a count must be at least 1 feature per image.")
    if keep is not None and not isinstance(budget, int) and not _is_share(budget):
        raise refuse(
            f"keep={keep!r} must be a share above 0 and at most 1, such as keep=0.5, or a whole number of features, "
            "such as keep=2048."
        )
    return None if share is None else float(share), budget


def _plain(value: object) -> float | int | None:
    """A number as Python's int or float; None for what is no number, True and False among it.

    A float of another precision is the decimal number it prints as: numpy's float32(0.1) is 0.1 here, although its
    bits say 0.10000000149, since 0.1 is what was meant.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Rational):
        return float(value)
    return float(str(value)) if isinstance(value, numbers.Real) else None


def _is_share(value: float | int | None) -> bool:
    return value is not None and 0 < value <= 1
