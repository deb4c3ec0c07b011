"""The documents of the local tasks for lmms-eval, from mini's held-out pictures."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

from crosstrim import mini


def rows_of(kind, count):
    return [row for row in mini.heldout() if row["kind"] == kind][:count]


def others(row, count):
    """Wrong answers: what other questions of the kind have as theirs."""
    every = dict.fromkeys(one["answers"][0] for one in rows_of(row["kind"], 256))
    return [one for one in every if one not in row["answers"]][:count]


def seed_like():
    for place, row in enumerate(rows_of("place_to_digit", 8) + rows_of("digit_to_colour", 8)):
        options = others(row, 3)
        options.insert(place % 4, row["answers"][0])
        yield {
            "question_id": row["id"],
            "images": [row["image"]],
            "question": row["question"],
            **{f"choice_{letter}": option for letter, option in zip("abcd", options, strict=True)},
            "answer": "ABCD"[place % 4],
            "data_type": "image",
        }


def mme_like():
    for kind in ("count", "colour_to_digit"):
        for row in rows_of(kind, 5):
            for claim, answer in ((row["answers"][0], "Yes"), (others(row, 1)[0], "No")):
                yield {
                    "question_id": row["id"],
                    "category": kind,
                    "images": [row["image"]],
                    "question": row["question"],
                    "claim": claim,
                    "answer": answer,
                }


def mmvp_like():
    by_question = defaultdict(list)
    for row in rows_of("place_to_colour", 256):
        by_question[row["question"]].append(row)
    pairs = [
        pair
        for rows in by_question.values()
        for pair in combinations(rows[:4], 2)
        if pair[0]["answers"][0] != pair[1]["answers"][0]
    ][:5]
    for number, pair in enumerate(pairs):
        options = [row["answers"][0] for row in pair]
        for place, row in enumerate(pair):
            yield {
                "Index": 2 * number + place,
                "images": [row["image"]],
                "question": row["question"],
                "options": options,
                "answer": "AB"[place],
            }


def llava_like():
    for category, kind in (("conv", "digit_to_place"), ("detail", "read"), ("complex", "count")):
        rows = rows_of(kind, 5)
        for place, row in enumerate(rows):
            # Text alone, one picture, or three; the first two pictures of three are others than the one asked about.
            images = {3: [], 4: [rows[0]["image"], rows[1]["image"], row["image"]]}.get(place, [row["image"]])
            yield {
                "question_id": row["id"],
                "category": category,
                "images": images,
                "question": row["question"],
                "gpt_answer": row["answers"][0],
            }


DOCUMENTS = {one.__name__: list(one()) for one in (seed_like, mme_like, mmvp_like, llava_like)}


NAMES = (*DOCUMENTS, "stop_like")
