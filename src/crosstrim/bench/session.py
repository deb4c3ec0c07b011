"""Suite "session": the first and the second question about a picture, each asked anew and in a session."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import crosstrim
from crosstrim import mini
from crosstrim.asking import answering, images
from crosstrim.bench.layers import compared
from crosstrim.bench.timing import Timing, alternate
from crosstrim.models import mllama

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"pictures": 3, "rounds": 15},
    "quick": {"pictures": 1, "rounds": 5},
    "tiny": {"pictures": 1, "rounds": 1},
}
CONFIG = crosstrim.TrimConfig(k=0.25)

Asked = list[tuple[float, int]]
"""For each question in its turn: seconds to the first token, and how often the vision tower was entered."""

Ask = Callable[[str], Any]
Begin = Callable[[str], Ask]
"""Takes a picture's file and gives what answers a question about it, with one token."""


def run(pictures: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure two questions about each of mini's example pictures.

    Args:
        pictures: how many of them.
        rounds: measured conversations about each.

    Yields:
        For each way (untrimmed, trimmed, session, and untrimmed in a session, which is given the features) and
        question one row: the time to the first token, as a ratio to that of the first question asked the same way,
        and the highest number of entries into the vision tower. Time begins with the question in hand and the
        picture in its file, as it does for a user.
    """
    model, processor = crosstrim.load("mini")
    ways: dict[str, Begin] = {
        "untrimmed": partial(_anew, model, processor, None),
        "trimmed": partial(_anew, model, processor, CONFIG),
        "session": partial(_session, model, processor, CONFIG),
        "features given": partial(_session, model, processor, None),
    }
    asked: dict[str, list[Asked]] = {way: [] for way in ways}
    for example in mini.examples()[:pictures]:
        questions = [one["question"] for one in example["questions"][:2]]
        variants = {
            way: partial(_conversation, model, begin, example["image"], questions) for way, begin in ways.items()
        }
        turns = alternate(variants, rounds=rounds, warm_up=1)
        for way in ways:
            asked[way] += turns[way]
    for way, conversations in asked.items():
        timings = [Timing.of([one[place][0] for one in conversations]) for place in range(2)]
        for place, question in enumerate(("first", "second")):
            yield {
                "model": "mini",
                "way": way,
                "question": question,
                **compared(timings[place], timings[0]),
                "vision_tower_entries": max(one[place][1] for one in conversations),
            }


def _conversation(model: Any, begin: Begin, file: str, questions: list[str]) -> Asked:
    found = []
    ask = begin(file)
    with _entries(model) as entries:
        for question in questions:
            begun = time.perf_counter()
            ask(question)
            found.append((time.perf_counter() - begun, len(entries)))
            entries.clear()
    return found


def _anew(model: Any, processor: Any, config: crosstrim.TrimConfig | None, file: str) -> Ask:
    return lambda question: answering.ask(
        model, processor, images.open_image(file), question, config, max_new_tokens=1
    )


def _session(model: Any, processor: Any, config: crosstrim.TrimConfig | None, file: str) -> Ask:
    @cache
    def session() -> crosstrim.Session:
        return crosstrim.Session(model, processor, file, CONFIG)

    if config is None:
        return lambda question: session().ask_untrimmed(question, max_new_tokens=1)
    return lambda question: session().ask(question, max_new_tokens=1)


@contextlib.contextmanager
def _entries(model: Any) -> Iterator[list[None]]:
    """A list that grows with each entry into the vision tower."""
    found: list[None] = []
    hook = mllama.locate(model).vision_model.register_forward_pre_hook(lambda *_: found.append(None))
    try:
        yield found
    finally:
        hook.remove()
