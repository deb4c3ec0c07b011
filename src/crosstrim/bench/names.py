"""The suites' names, for those who only list them: the suites themselves need torch."""

from __future__ import annotations

SUITES = ("layers", "decode", "stack", "saliency", "growth", "merge", "session", "mini", "gpu")
