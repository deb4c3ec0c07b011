"""Open pages: what each of them shows, and which of its wishes still counts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING

from crosstrim.errors import InputError

if TYPE_CHECKING:
    from crosstrim.play.state import Subject

MAX_VISITORS = 100
"""Pages whose picture is held; beyond it, that of the page that was used longest ago is let go."""


class SupersededError(Exception):
    """Nobody waits for this any more: the visitor wished for something else."""


class Wish:
    """Something that a visitor asked for, until something else is asked for in its place.

    Args:
        about: what tells it from others; None tells it from every other.
        sent: when the page sent it, by the page's own clock.

    Attributes:
        about: likewise.
        sent: when it was last wished for.
    """

    def __init__(self, about: Hashable = None, sent: float = 0.0) -> None:
        self.about = about
        self.sent = sent
        self._superseded = threading.Event()

    def supersede(self) -> None:
        """Nobody waits for it any more."""
        self._superseded.set()

    def is_superseded(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._superseded.is_set()


class Visitor:
    """One open page. Of each kind of wish only the last one counts."""

    def __init__(self) -> None:
        self._subject: Subject | None = None
        self._wishes: dict[str, Wish] = {}
        self._lock = threading.Lock()

    @property
    def subject(self) -> Subject:
        """The picture on the page.

        Raises:
            InputError: there is none.
        """
        if self._subject is None:
            raise InputError("there is no picture yet; pick an example, or drop one of your own.")
        return self._subject

    def wish(self, kind: str, about: Hashable = None, sent: float = 0.0) -> Wish:
        """A wish, which supersedes the one before it of the same kind; one for the same thing is that one.

        Args:
            kind: of which only the last one counts.
            about: as of `Wish`. Pages tell some things twice.
            sent: as of `Wish`. What a page sends quickly may arrive in another order: the last one sent counts.
        """
        wish = Wish(about, sent)
        with self._lock:
            if (known := self._wishes.get(kind)) is not None:
                if about is not None and known.about == about and not known.is_superseded():
                    known.sent = max(known.sent, sent)
                    return known
                if sent < known.sent:
                    wish.supersede()
                    return wish
                known.supersede()
            self._wishes[kind] = wish
        return wish

    def show(self, subject: Subject | None) -> None:
        """Another picture, or none: nothing that was wished for counts any more."""
        with self._lock:
            for wish in self._wishes.values():
                wish.supersede()
            self._wishes.clear()
            self._subject = subject


class Visitors:
    """The open pages by their keys.

    Args:
        most: how many of them hold a picture.
    """

    def __init__(self, most: int = MAX_VISITORS) -> None:
        self._most = most
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Pages that are known."""
        return len(self._visitors)

    def of(self, key: str) -> Visitor:
        """The visitor of this key, who may be new."""
        with self._lock:
            visitor = self._visitors.setdefault(key, Visitor())
            self._visitors.move_to_end(key)
            gone = self._visitors.popitem(last=False)[1] if len(self._visitors) > self._most else None
        if gone is not None:
            gone.show(None)
        return visitor

    def forget(self, key: str) -> None:
        """The page was closed."""
        with self._lock:
            visitor = self._visitors.pop(key, None)
        if visitor is not None:
            visitor.show(None)
