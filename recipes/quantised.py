"""What weights in four or eight bits do to what is kept and to answers, on mini: `python -m recipes.quantised`.

Every fifth of mini's held-out questions is asked of the whole model and of quantised ones, which differ in what of
them is quantised (`WAYS`). Takes about half an hour on one core. Writes evaluation/results/mini-quantised.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from recipes.calibration import RESULTS

import crosstrim
from crosstrim.asking.answering import generate
from crosstrim.asking.batches import Encoder
from crosstrim.data import dataset
from crosstrim.data.dataset import Dataset, Item
from crosstrim.eval import metrics, provenance
from crosstrim.eval.defaults import HELDOUT_TOKENS
from crosstrim.files import write_json
from crosstrim.memory import WEIGHT_BITS
from crosstrim.models import quantised

OUT = RESULTS / "mini-quantised.json"

EVERY = 5
KEEPS = (0.5, 0.1)
BATCH = 64
ALL, NO_LEADER, NO_VISION, USUAL, LEADER = WAYS = (
    "everything",
    "all but the leader",
    "all but the vision tower",
    "all but both",
    "the leader alone",
)
"""What is quantised. The leader is q, k and v of the first cross-attention layer; the head and the projection of
image features never are. `crosstrim.load(quantization=...)` quantises all but both."""

Answers = dict[str, list[str]]
Kept = dict[str, list[set[int]]]


def left_whole(model: Any, way: str) -> list[str]:
    """The modules that one of the `WAYS` leaves as they are."""
    vision, others = "model.vision_model", ["lm_head", "model.multi_modal_projector"]
    leader = [name for name in quantised.left_whole(model.config) if ".cross_attn." in name]
    if way == LEADER:
        linear = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
        return [name for name in linear if name not in leader]
    left = {ALL: [], NO_LEADER: leader, NO_VISION: [vision], USUAL: [*leader, vision]}
    return others + left[way]


def asked(model: Any, processor: Any, items: Sequence[Item]) -> tuple[Answers, Kept]:
    """A model's answers, untrimmed and at each budget, and the features that each budget kept."""
    encoder = Encoder(model, processor)
    trims = {"untrimmed": None} | {f"keep={keep}": crosstrim.TrimConfig(keep=keep) for keep in KEEPS}
    answers: Answers = {label: [] for label in trims}
    kept: Kept = {label: [] for label in trims if label != "untrimmed"}
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        with encoder.asked([[item.open()] for item in batch], [item.question for item in batch]) as inputs:
            for label, config in trims.items():
                found = generate(model, processor, inputs, config=config, max_new_tokens=HELDOUT_TOKENS)
                answers[label] += found.texts
                if config is not None:
                    kept[label] += [set(images[0].kept_indices) for images in found.kept]
    return answers, kept


def row(name: str | None, way: str | None, items: Sequence[Item], own: Any, whole: Any) -> dict[str, Any]:
    """The numbers of one model beside those of the whole one, each of `asked`; shares of the questions."""
    (answers, kept), (whole_answers, whole_kept) = own, whole

    def differ(one: list[str], other: list[str]) -> float:
        return round(fmean(a != b for a, b in zip(one, other, strict=True)), 4)

    def right(texts: list[str]) -> float:
        return round(fmean(metrics.is_right(a, item.answers) for a, item in zip(texts, items, strict=True)), 4)

    def overlap(label: str) -> float:
        pairs = zip(kept[label], whole_kept[label], strict=True)
        return round(fmean(len(mine & others) / len(others) for mine, others in pairs), 4)

    budgets = {
        label: {
            "overlap": overlap(label),  # of what is kept with what the whole model keeps
            "changed_by_trimming": differ(answers[label], answers["untrimmed"]),
            "right": right(answers[label]),
        }
        for label in kept
    }
    return {
        "quantization": name,
        "quantised": way,
        "changed_by_quantising": differ(answers["untrimmed"], whole_answers["untrimmed"]),
        "right": right(answers["untrimmed"]),
        "budgets": budgets,
    }


def compute() -> dict[str, Any]:
    """The result as plain JSON types."""
    everything = dataset.embedded()
    questions: Dataset = replace(everything, items=everything.items[::EVERY])
    model, processor = crosstrim.load("mini")
    whole = asked(model, processor, questions.items)
    rows = [row(None, None, questions.items, whole, whole)]
    for name in WEIGHT_BITS:
        for way in WAYS:
            wanted = quantised.request(name, model.config, torch.float32, left_whole(model, way))
            smaller, _ = crosstrim.load("mini", quantization_config=wanted)
            rows.append(row(name, way, questions.items, asked(smaller, processor, questions.items), whole))
            print(rows[-1])
    return {
        "format": 1,
        "dataset": provenance.of_dataset(questions),
        "every": EVERY,
        "model": provenance.of_model(model, "mini"),
        "generation": {"max_new_tokens": HELDOUT_TOKENS, "do_sample": False, "batch_size": BATCH},
        "rows": rows,
        "libraries": quantised.versions(),
        **provenance.of_software(model),
    }


if __name__ == "__main__":
    write_json(OUT, compute())
