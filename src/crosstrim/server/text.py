"""An answer's text as it grows, in pieces that no later token changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of half a character


class GrowingText:
    """The text of the tokens so far, of which only what is final is given away.

    Held back are the bytes of a character that is not complete, white space that may turn out to be the end, and
    what may be the beginning of a stop string.

    Args:
        decode: tokens to text, special tokens left out.
        stops: strings that end the text and do not belong to it.

    Attributes:
        stopped: whether a stop string was met.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        self._given = ""
        self.stopped = False

    @property
    def count(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def add(self, token: int) -> str:
        """Take in a token; the text that became final."""
        self._tokens.append(token)
        raw = self._decode(self._tokens)
        met = [place for place in map(raw.find, self._stops) if place >= 0]
        if met:
            self.stopped = True
            return self._give(raw[: min(met)].strip())
        whole = raw.rstrip(_INCOMPLETE)
        return self._give(whole[: self._safe(whole)].strip())

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return "" if self.stopped else self._give(self._decode(self._tokens).strip())

    def _give(self, text: str) -> str:
        new, self._given = text[len(self._given) :], max(self._given, text, key=len)
        return new

    def _safe(self, raw: str) -> int:
        """Up to where `raw` can be no beginning of a stop string."""
        for length in range(min(len(raw), max(map(len, self._stops), default=0)), 0, -1):
            if any(stop.startswith(raw[-length:]) for stop in self._stops):
                return len(raw) - length
        return len(raw)
