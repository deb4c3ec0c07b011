"""Questions about a page, with answers that are right by construction."""

from __future__ import annotations

import numpy as np
from recipes.training.task import Question

from .pages import Entry, Page
from .words import FIELDS, ITEMS, WORDS

LOOKUPS = ("by_key", "quantity", "by_value", "by_place")
"""Kinds whose answer lies in one small region of the page."""

KINDS = (*LOOKUPS, "copy", "yes_no", "compare", "count")

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
NEITHER = ("Shop", "Date", "Total", "Cash")
"""What a receipt says beside its items."""

_BY_KEY = {
    "Shop": ("What is the shop called?", "Which shop is it from?"),
    "Date": ("What is the date?", "Which day is it from?"),
    "Total": ("What is the total?", "How much is it in all?"),
    "Cash": ("How much cash was paid?", "How much was paid?"),
    "Dear": ("Who is the letter to?", "Who gets the letter?"),
    "Send": ("What should be sent?", "What is asked for?"),
    "to": ("Which city is it for?", "Where should it go?"),
    "by": ("By when is it needed?", "Which day is the limit?"),
    "Yours": ("Who wrote the letter?", "Who is it from?"),
}
_PRICE = ("What does the {key} cost?", "How much is the {key}?")
_FIELD = ("What is the {key}?", "What does it say for {key}?")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "quantity": ("What is the quantity of {key}?", "How many of {key}?"),
    "by_value": ("What costs {value}?", "What is sold for {value}?"),
    "by_place": ("What is the {ordinal} item?", "Which item comes {ordinal}?"),
    "copy": ("Read the {ordinal} line.", "What does the {ordinal} line say?"),
    "yes_no": ("Is there {key} on it?", "Does it list {key}?"),
    "compare": ("Which costs more, {key} or {other}?", "What is dearer, {key} or {other}?"),
    "count": ("How many items are there?", "Count the items."),
}
TELL_PROMPT = "Tell."


def items(page: Page) -> list[Entry]:
    """Return what a receipt or a table lists, from the top."""
    if page.kind not in ("receipt", "table"):
        return []
    return [entry for entry in page.entries if entry.key not in NEITHER]


def ask(page: Page, kind: str, rng: np.random.Generator) -> Question | None:
    """Ask one question of a kind, in one of its wordings; None where such a page cannot be asked so."""
    listed = items(page)
    if kind == "by_key":
        entry = page.entries[rng.integers(len(page.entries))]
        own = _BY_KEY.get(entry.key) if page.kind in ("receipt", "letter") else None
        return _question(kind, own or (_FIELD if page.kind == "form" else _PRICE), entry.value, rng, key=entry.key)
    if kind == "copy":
        line = int(rng.integers(min(len(page.lines), len(ORDINALS))))
        return _question(kind, TEMPLATES[kind], page.lines[line], rng, ordinal=ORDINALS[line])
    if not listed or (kind == "quantity" and page.kind != "table"):
        return None
    place = int(rng.integers(len(listed)))
    entry, other = listed[place], listed[place - 1]
    fillings = {"key": entry.key, "value": entry.value, "other": other.key, "ordinal": ORDINALS[place]}
    dearer = max(entry, other, key=lambda one: float(one.value))
    answer = {
        "quantity": entry.quantity,
        "by_value": entry.key,
        "by_place": entry.key,
        "yes_no": "yes",
        "compare": dearer.key,
        "count": str(len(listed)),
    }[kind]
    if kind == "yes_no" and rng.random() < 0.5:
        absent = [item for item in ITEMS if item not in {one.key for one in listed}]
        fillings["key"], answer = absent[rng.integers(len(absent))], "no"
    return _question(kind, TEMPLATES[kind], answer, rng, **fillings)


def _question(kind: str, templates: tuple[str, ...], answer: str, rng: np.random.Generator, **fill: str) -> Question:
    return Question(templates[rng.integers(len(templates))].format(**fill), answer, kind)


def tell(page: Page, rng: np.random.Generator) -> Question:
    """Tell some entries, in random order, or their values first: a dense lesson, never tested.

    A number follows its key without a space: that would be a token between them, and hide which key was looked up.
    """
    most = 2 if page.kind == "letter" else 3  # whose entries are longer
    chosen = [page.entries[index] for index in rng.permutation(len(page.entries))[:most]]
    key_first = rng.random() >= 0.5
    parts = []
    for one in chosen:
        values = [one.quantity, one.value] if one.quantity else [one.value]
        said = [one.key, *values] if key_first else [*values[::-1], one.key]
        between = "" if key_first and values[0][0].isdigit() else " "
        parts.append(said[0] + between + " ".join(said[1:]))
    return Question(TELL_PROMPT, ", ".join(parts), "tell")


def lesson(page: Page, amount: int, rng: np.random.Generator) -> list[Question]:
    """Return what one training step asks about one page: half is telling, and then comes every kind in turn."""
    questions = [tell(page, rng) for _ in range(amount // 2)]
    while len(questions) < amount:
        question = ask(page, KINDS[rng.integers(len(KINDS))], rng)
        if question is not None:
            questions.append(question)
    return questions


def corpus() -> list[str]:
    """Return every wording and every word: what the tokenizer is trained on."""
    texts = {TELL_PROMPT, "user", "assistant", "system", "x x"}
    for templates in (*_BY_KEY.values(), *TEMPLATES.values(), _PRICE, _FIELD):
        for template in templates:
            texts |= {template.format(key=key, other=key, value="12", ordinal=one) for key, one in _fillings()}
    words = [word for word in WORDS if not word.isdigit()]
    texts |= {f"{word} {word}, {word}" for word in words}
    numbers = [f"{one} {one}, {one}" for one in range(100)]
    return [*sorted(texts), *numbers * 4]


def _fillings() -> list[tuple[str, str]]:
    return [(key, ORDINALS[place % len(ORDINALS)]) for place, key in enumerate((*ITEMS, *FIELDS))]
