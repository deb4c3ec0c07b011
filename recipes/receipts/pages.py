"""Pages as people photograph them: receipts, forms, tables and short letters, and what every patch of them shows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from recipes.training import files
from recipes.training.tiles import IGNORE, label_tiles

from . import fonts
from .settings import PATCH, TILE
from .words import CITIES, FIELDS, INDEX, ITEMS, LETTERED, MONTHS, NAMES, SHOP_KINDS, SHOPS, WORDS

LAYOUTS: dict[str, tuple[tuple[int, int], ...]] = {
    "receipt": ((2, 2),),
    "form": ((2, 2),),
    "table": ((2, 2), (1, 4)),
    "letter": ((2, 2), (1, 4)),
}
"""Rows and columns of tiles that each kind of page may have: four tiles, always."""

KINDS = tuple(LAYOUTS)
_CROWD_PITCH = 24
MOST_LINES = max(rows for layouts in LAYOUTS.values() for rows, _ in layouts) * TILE // _CROWD_PITCH
NO_WORD, NO_KEY = len(INDEX), len(LETTERED)
NO_LINE, NO_TENS, NO_FOLLOW = MOST_LINES, 10, 6
SIZES = (19, 23)
"""Pixels of the type, smallest and largest; a line that does not fit is set smaller."""
_STRETCHED = (0.85, 1.15)
"""How narrow and how wide training sets its letters: few typefaces are to stand for those it never sees."""
LETTER_KEYS = ("Dear", "Send", "to", "by", "Yours")
"""The words of a letter that say what the words after them are."""

_PIECE = re.compile(r"[A-Za-z]+|\d+")


@dataclass(frozen=True)
class Entry:
    """One thing that a page says: a key and its value, and of tables a quantity too."""

    key: str
    value: str
    line: int
    quantity: str = ""


@dataclass(frozen=True)
class Line:
    """One line before it is set: texts, and for each where on the line it stands.

    Attributes:
        cells: text, "l", "m" or "r" for which part of it lies at a place, and that place from 0 to 1.
        key: what its words belong to; empty for words of no entry.
        ruled: whether a rule is drawn beneath it.
    """

    cells: tuple[tuple[str, str, float], ...]
    key: str = ""
    ruled: bool = False

    @property
    def text(self) -> str:
        """What the line says, read from the left."""
        return " ".join(text for text, _, _ in self.cells)


@dataclass(frozen=True)
class Piece:
    """One word or number where it was set, in pixels."""

    word: str
    key: str
    line: int
    left: float
    right: float
    top: float
    bottom: float


@dataclass(frozen=True)
class Page:
    """A page, what it says, and where."""

    pixels: np.ndarray
    layout: tuple[int, int]
    kind: str
    lines: tuple[str, ...]
    entries: tuple[Entry, ...]
    pieces: tuple[Piece, ...]


Draft = tuple[list[Line], list[Entry]]


def _pick(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[rng.integers(len(words))]


def _date(rng: np.random.Generator) -> str:
    return f"{rng.integers(1, 32)} {_pick(MONTHS, rng)}"


def _priced(rng: np.random.Generator, most: int) -> list[tuple[str, int]]:
    """Some items, all different, and their prices, all different too."""
    count = int(rng.integers(3, most + 1))
    prices = rng.choice(np.arange(1, 20), count, replace=False)
    names = rng.choice(len(ITEMS), count, replace=False)
    return [(ITEMS[name], int(price)) for name, price in zip(names, prices, strict=True)]


def _receipt(rng: np.random.Generator) -> Draft:
    shop, date = f"{_pick(SHOPS, rng)} {_pick(SHOP_KINDS, rng)}", _date(rng)
    items = _priced(rng, most=5)
    lines = [Line(((shop, "m", 0.5),), "Shop"), Line(((date, "m", 0.5),), "Date", ruled=rng.random() < 0.5)]
    entries = [Entry("Shop", shop, 0), Entry("Date", date, 1)]
    total = sum(price for _, price in items)
    paid = [("Total", total)]
    if rng.random() < 0.5:
        paid.append(("Cash", min(99, -(-total // 5) * 5)))
    for key, price in items + paid:
        entries.append(Entry(key, str(price), len(lines)))
        ruled = key == items[-1][0] and bool(rng.random() < 0.7)
        lines.append(Line(((key, "l", 0), (str(price), "r", 1)), key, ruled))
    return lines, entries


def _form(rng: np.random.Generator) -> Draft:
    count = int(rng.integers(4, len(FIELDS) + 1))
    colon, column, ruled = (":" if rng.random() < 0.5 else ""), rng.uniform(0.38, 0.5), bool(rng.random() < 0.5)
    values = {
        "Name": _pick(NAMES, rng),
        "City": _pick(CITIES, rng),
        "Date": _date(rng),
        "Room": str(rng.integers(1, 100)),
        "Seat": str(rng.integers(1, 100)),
        "Guest": _pick(NAMES, rng),
    }
    chosen = [FIELDS[index] for index in rng.permutation(len(FIELDS))[:count]]
    lines = [Line(((key + colon, "l", 0), (values[key], "l", column)), key, ruled) for key in chosen]
    return lines, [Entry(key, values[key], line) for line, key in enumerate(chosen)]


def _table(rng: np.random.Generator) -> Draft:
    items = _priced(rng, most=4)
    quantities = rng.choice(np.arange(1, 30), len(items), replace=False)
    lines = [Line((("Item", "l", 0), ("Qty", "r", 0.62), ("Price", "r", 1)), ruled=True)]
    entries = []
    for (key, price), quantity in zip(items, quantities, strict=True):
        entries.append(Entry(key, str(price), len(lines), str(quantity)))
        lines.append(Line(((key, "l", 0), (str(quantity), "r", 0.62), (str(price), "r", 1)), key))
    return lines, entries


def _letter(rng: np.random.Generator) -> Draft:
    to, sender = (NAMES[index] for index in rng.choice(len(NAMES), 2, replace=False))
    wish, city, date = f"{rng.integers(2, 30)} x {_pick(ITEMS, rng)}", _pick(CITIES, rng), _date(rng)
    texts = [f"Dear {to},", f"Send {wish}", f"to {city} by {date}.", f"Yours, {sender}"]
    if rng.random() < 0.5:
        texts.insert(3, "Thank you")
    lines = [Line(((text, "l", 0),)) for text in texts]
    last = len(lines) - 1
    values, places = (to, wish, city, date, sender), (0, 1, 2, 2, last)
    return lines, [Entry(*entry) for entry in zip(LETTER_KEYS, values, places, strict=True)]


_DRAFTS = {"receipt": _receipt, "form": _form, "table": _table, "letter": _letter}


def page(split: str, kind: str, layout: tuple[int, int], rng: np.random.Generator) -> Page:
    """Draw a page.

    Args:
        split: Whose typefaces to use.
        kind: One of `KINDS`.
        layout: Rows and columns of tiles.
        rng: Decides everything else.
    """
    lines, entries = _DRAFTS[kind](rng)
    pixels, pieces = _print(lines, split, layout, rng)
    return Page(pixels, layout, kind, tuple(line.text for line in lines), tuple(entries), tuple(pieces))


def crowd(split: str, layout: tuple[int, int], rng: np.random.Generator) -> Page:
    """Draw a page full of words that mean nothing together: many examples for the vision encoder at once."""
    per_line, count = layout[1] * 3 // 2, layout[0] * TILE // _CROWD_PITCH
    lines = []
    for _ in range(count):
        words = [WORDS[index] if index < len(WORDS) else "" for index in rng.integers(0, len(WORDS) + 40, per_line)]
        cells = [(text, "l", (place + rng.uniform(0, 0.1)) / per_line) for place, text in enumerate(words) if text]
        lines.append(Line(tuple(cells), ruled=rng.random() < 0.2))
    pixels, pieces = _print(lines, split, layout, rng)
    return Page(pixels, layout, "", (), (), tuple(pieces))


def _print(
    lines: list[Line], split: str, layout: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, list[Piece]]:
    """Set lines on paper, in one face and size, and return the picture and where every word stands."""
    rough = split == "train"
    stretch = rng.uniform(*_STRETCHED) if rough else 1.0
    height, width = layout[0] * TILE, round(layout[1] * TILE / stretch)
    stretch = layout[1] * TILE / width  # of whole pixels
    faces = fonts.of_split(split)
    path, size = faces[rng.integers(len(faces))], int(rng.integers(SIZES[0], SIZES[1] + 1))
    margin = rng.uniform(3, 8)
    while any(_width(line, path, size) > width - 2 * margin for line in lines) and size > 12:
        size -= 1
    pitch = min(size * rng.uniform(1.25, 1.5), (height - 6) / len(lines))
    top = rng.uniform(2, max(3, height - pitch * len(lines) - 2))
    paper, ink = rng.uniform(215, 250) + rng.uniform(-15, 5, 3), rng.uniform(0, 90) + rng.uniform(0, 30, 3)
    image = Image.new("RGB", (width, height), tuple(int(value) for value in paper))
    draw, shade = ImageDraw.Draw(image), tuple(int(value) for value in ink)
    font = fonts.load(path, size)
    ascent = font.getbbox("H", anchor="ls")[1]
    pieces = []
    for number, line in enumerate(lines):
        baseline = round(top + pitch * number + (pitch - ascent) / 2)
        for text, anchor, place in line.cells:
            length = font.getlength(text)
            x = margin + place * (width - 2 * margin) - {"l": 0, "m": length / 2, "r": length}[anchor]
            x = min(max(x, 1), width - 1 - length)
            draw.text((x, baseline), text, fill=shade, font=font, anchor="ls")
            key = line.key
            for found in _PIECE.finditer(text):
                word = found.group()
                if not line.key and word in LETTER_KEYS:
                    key = word  # what follows in a letter belongs to this word
                left, right = (stretch * (x + font.getlength(text[:end])) for end in found.span())
                pieces.append(Piece(word, key, number, left, right, baseline + ascent, baseline))
        if line.ruled:
            y = baseline + max(2, round(pitch * 0.2))
            draw.line((margin, y, width - margin, y), fill=shade)
    image = image.resize((layout[1] * TILE, height), Image.Resampling.BICUBIC)
    return _worn(image, rng, rough), pieces


def _width(line: Line, path: Path, size: int) -> float:
    font = fonts.load(path, size)
    return sum(font.getlength(text) for text, _, _ in line.cells) + 6 * (len(line.cells) - 1)


def _worn(image: Image.Image, rng: np.random.Generator, rough: bool) -> np.ndarray:
    """Return the page as bytes, a little uneven in light; training pages are also blurred, noisy and compressed."""
    canvas = np.asarray(image, np.float32)
    light = np.linspace(rng.uniform(0.85, 1), rng.uniform(0.85, 1), canvas.shape[1], dtype=np.float32)
    canvas = canvas * light[None, :, None]
    if rough and rng.random() < 0.4:
        blurred = Image.fromarray(canvas.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
        canvas = np.asarray(blurred, np.float32)
    return files.finish(canvas, rng, rough, noise=8, quality=(75, 96), subsampling=-1)


def patch_labels(page: Page) -> dict[str, np.ndarray]:
    """Return what each patch shows: arrays [MAX_TILES, patches], `IGNORE` where there is nothing to learn.

    `word` is the word or number whose box covers the patch's centre, `tens` and `ones` are a number's digits, `line`
    is its line's number, `follow` how many words stand on that line after it (five at most), and `entry` the key that
    it belongs to, ignored on crowds. Every word has a patch of its own, the nearest if it covers none.
    """
    rows, columns = page.layout[0] * TILE // PATCH, page.layout[1] * TILE // PATCH
    words = np.full((rows, columns), NO_WORD)
    lines = np.full((rows, columns), NO_LINE)
    entries = np.full((rows, columns), IGNORE if not page.kind else NO_KEY)
    tens, ones = np.full((2, rows, columns), IGNORE)
    following = np.full((rows, columns), NO_FOLLOW)
    left = Counter(piece.line for piece in page.pieces)
    for piece in page.pieces:
        around = _rows(piece, PATCH), _columns(piece)
        words[around] = lines[around] = entries[around] = following[around] = IGNORE
    for piece in page.pieces:
        where = _rows(piece, 0), _columns(piece)
        words[where] = INDEX.get(piece.word, NO_WORD)
        if piece.word.isdigit():
            tens[where], ones[where] = int(piece.word[-2]) if len(piece.word) > 1 else NO_TENS, int(piece.word[-1])
        left[piece.line] -= 1
        lines[where], following[where] = piece.line, min(left[piece.line], NO_FOLLOW - 1)
        if page.kind:
            entries[where] = INDEX.get(piece.key, NO_KEY)
    labels = {"word": words, "tens": tens, "ones": ones, "line": lines, "entry": entries, "follow": following}
    return label_tiles(labels, page.layout)


def _rows(piece: Piece, around: float) -> slice:
    """The rows of patches whose centres lie between a word's top and bottom, or as far around it."""
    first = int(np.ceil((piece.top - around) / PATCH - 0.5))
    last = int(np.floor((piece.bottom + around) / PATCH - 0.5))
    return slice(max(first, 0), max(last, first) + 1)


def _columns(piece: Piece) -> slice:
    first = int(np.ceil(piece.left / PATCH - 0.5))
    last = int(np.floor(piece.right / PATCH - 0.5))
    if last < first:  # between two centres
        first = last = int((piece.left + piece.right) / 2 // PATCH)
    return slice(max(first, 0), last + 1)
