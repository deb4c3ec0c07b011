"""Questions about a picture, with answers that are right by construction."""

from __future__ import annotations

import numpy as np
from recipes.training.task import Question

from .pictures import COLOURS, MOST, PLACES, Digit, Scene

LOOKUPS = (
    "place_to_digit",
    "colour_to_digit",
    "place_to_colour",
    "digit_to_colour",
    "digit_to_place",
    "colour_to_place",
)
"""Kinds whose answer lies in one small region, which the question names."""

WHOLE = ("count", "read")
"""Kinds that need the whole picture."""

MOSTLY_WHOLE = ("count", "count", "read", "read", "read")
"""What a lesson asks of the whole picture once lookups are learned: these kinds are learned last."""

MOSTLY_READING = ("count", "count", "read", "read", "read", "read", "read", "read")
"""And in the end, since reading is learned last of all."""

KINDS = LOOKUPS + WHOLE

TEMPLATES: dict[str, tuple[str, ...]] = {
    "place_to_digit": (
        "What digit is {where}?",
        "Which digit is {where}?",
        "What number is {where}?",
        "Which number do you see {where}?",
    ),
    "colour_to_digit": (
        "What digit is {colour}?",
        "Which digit is {colour}?",
        "What is the {colour} digit?",
        "Which number is {colour}?",
    ),
    "place_to_colour": (
        "What color is the digit {where}?",
        "What colour is the digit {where}?",
        "Which color is the number {where}?",
        "Which colour is the number {where}?",
    ),
    "digit_to_colour": (
        "What color is the {value}?",
        "What colour is the {value}?",
        "Which color is the digit {value}?",
        "Which colour is the digit {value}?",
        "What is the color of the {value}?",
        "What is the colour of the {value}?",
    ),
    "digit_to_place": (
        "Where is the {value}?",
        "Where is the digit {value}?",
        "Where do you see the {value}?",
        "Where is the number {value}?",
    ),
    "colour_to_place": (
        "Where is the {colour} digit?",
        "Where is the {colour} number?",
        "Where do you see the {colour} digit?",
        "Where is the {colour} one?",
    ),
    "count": (
        "How many digits are there?",
        "How many digits do you see?",
        "How many numbers are in the picture?",
        "Count the digits.",
    ),
    "read": (
        "Read all the digits.",
        "Read the digits in order.",
        "Which digits are in the picture?",
        "What digits do you see?",
    ),
}
CAPTION_PROMPT = "Describe some digits."
_CAPTION_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_SIDES = {"left": "on the left", "right": "on the right", "middle": "in the middle"}


def where(place: str) -> str:
    """Return how English says that something is at this place."""
    return _SIDES.get(place, f"at the {place}")


def _answer(kind: str, digit: Digit, scene: Scene) -> str:
    if kind == "count":
        return str(len(scene.digits))
    if kind == "read":
        return " ".join(str(one.value) for one in scene.digits)
    return {"digit": str(digit.value), "colour": digit.colour, "place": digit.place}[kind.split("_to_")[1]]


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """Ask one question of a kind, about a random digit of the picture, in one of its wordings."""
    digit = scene.digits[rng.integers(len(scene.digits))]
    templates = TEMPLATES[kind]
    text = templates[rng.integers(len(templates))].format(
        where=where(digit.place), colour=digit.colour, value=digit.value
    )
    return Question(text, _answer(kind, digit, scene), kind)


def describe_some(scene: Scene, rng: np.random.Generator) -> Question:
    """Describe two digits in random order, the words of each in random order too: a dense lesson, never tested."""
    order = _CAPTION_ORDERS[rng.integers(len(_CAPTION_ORDERS))]
    chosen = rng.permutation(len(scene.digits))[:2]
    facts = [(str(d.value), d.colour, d.place) for d in (scene.digits[index] for index in chosen)]
    caption = ", ".join(" ".join(fact[index] for index in order) for fact in facts)
    return Question(CAPTION_PROMPT, caption, "describe")


def lesson(scene: Scene, amount: int, rng: np.random.Generator, whole: tuple[str, ...] = WHOLE) -> list[Question]:
    """Return what one training step asks about one picture: captions, the `whole` kinds, the rest lookups."""
    captions = 1 if whole == MOSTLY_READING else max(1, amount // 4)
    questions = [describe_some(scene, rng) for _ in range(captions)]
    questions += [ask(scene, kind, rng) for kind in whole]
    while len(questions) < amount:
        questions.append(ask(scene, LOOKUPS[rng.integers(len(LOOKUPS))], rng))
    return questions[:amount]


def corpus() -> list[str]:
    """Return every wording with every filling: what the tokenizer is trained on."""
    texts = {CAPTION_PROMPT, "user", "assistant", "system"}
    for templates in TEMPLATES.values():
        for template in templates:
            for place in PLACES:
                texts |= {template.format(where=where(place), colour=name, value=0) for name in COLOURS}
    texts |= {f"{value} {colour} {place}, {value}" for value in range(10) for colour in COLOURS for place in PLACES}
    texts |= {f"{place} {colour} {value}, {place}" for value in range(10) for colour in COLOURS for place in PLACES}
    texts |= {f"{colour} {place} {value}, {colour}" for value in range(10) for colour in COLOURS for place in PLACES}
    return [*sorted(texts), " ".join(str(value) for value in range(MOST))]
