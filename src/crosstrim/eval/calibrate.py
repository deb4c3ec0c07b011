"""The smallest budget that is safe for one's own questions, with a guarantee: learn, then test."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crosstrim.asking import answering
from crosstrim.calibrated import FORMAT, read
from crosstrim.config import TrimConfig
from crosstrim.data import dataset
from crosstrim.data.dataset import Dataset
from crosstrim.data.journal import Journal, Record, check_same, journal_of
from crosstrim.errors import CalibrationError, ConfigError, DatasetError
from crosstrim.eval import defaults, sweep
from crosstrim.eval import risk as exact
from crosstrim.eval.cost import Prices
from crosstrim.eval.rules import Rule, rules_of
from crosstrim.eval.settings import UNTRIMMED, Setting
from crosstrim.files import write_json
from crosstrim.method.policy import Voter, name_of


def calibrate(
    model: Any,
    processor: Any,
    data: str | os.PathLike[str] | Dataset,
    out: str | os.PathLike[str],
    *,
    k: Sequence[float] = (),
    keep: Sequence[float | int] = (),
    policy: str | Voter | None = None,
    risk: float = defaults.RISK,
    confidence: float = defaults.CONFIDENCE,
    loss: str = "answer",
    escalate: Sequence[float] = (),
    questions: int | None = None,
    seed: int = 0,
    question: str | None = None,
    name: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = defaults.DATA_TOKENS,
    progress: sweep.Progress = lambda done, total: None,
    **options: Any,
) -> dict[str, Any]:
    """Find the smallest budget whose risk is at most `risk`, with confidence `confidence`.

    The risk of a budget is the chance that trimming to it changes the greedy answer to a question like these. Budgets
    are tested from the largest down by exact binomial tails, until one is not certified (Angelopoulos et al., arXiv
    2110.01052). Called again after a kill, it goes on where the last batch ended.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        data: a file of questions or a folder of pictures, as of `crosstrim.data.dataset.read`; or what that gave.
        out: the .json file to write, with every answer; `TrimConfig.from_calibration` reads it.
        k: values of `TrimConfig.k` to test.
        keep: values of `TrimConfig.keep` to test, all shares or all numbers. With neither `k` nor `keep`, shares from
            0.5 to 0.05.
        policy: of `TrimConfig`.
        risk: share of changed answers that is allowed, in (0, 1).
        confidence: in (0, 1).
        loss: "answer" counts answers that differ from the untrimmed model's; "wrong" those that are right untrimmed
            and wrong trimmed, which needs `answers` in the data.
        escalate: thresholds to test together with the budgets: an answer one of whose tokens had a lower probability
            is made again untrimmed. See `rules_of` for the order of the tests.
        questions: how many to draw; None is 600, or all where there are fewer.
        seed: of the draw.
        question: asked of every picture that has none of its own.
        name: of the model, for the result; None is what transformers calls it.
        batch_size: questions answered together.
        max_new_tokens: where to cut answers off.
        progress: called with how many answers are done or no longer needed, and of how many.
        **options: other fields of `TrimConfig`, the same for all budgets.

    Returns:
        The result as plain JSON types, as it is in `out`. `chosen` is of what is certified the rule that keeps least,
        or None where nothing is, and `refusal` says why.

    Raises:
        CalibrationError: so few questions cannot support the claim, whatever they show; it names how many could.
        ConfigError: an option is out of range, or the budgets have no order.
        DatasetError: the data cannot be read, has rows that cannot be asked, or fewer questions than wanted.
        ResultError: `out` or its journal belongs to another run, or cannot be written.
    """
    out = Path(out)
    settings = budgets(k, keep, policy, **options)
    settings = tuple(
        replace(one, config=answering.for_tokenizer(one.config, processor.tokenizer)) for one in settings
    )
    check(risk, confidence, loss)
    rules = rules_of(settings, escalate)
    sweep.check_path(out)
    if not isinstance(data, Dataset):
        data = dataset.read(Path(data), question, labelled=loss == "wrong").usable("stop")
    if loss == "wrong" and not all(item.answers for item in data.items):
        raise DatasetError(
            f"{data.name} has questions without answers, which loss='wrong' needs; take loss='answer'."
        )
    drawn = draw(data, questions, seed)
    check_count(len(drawn.items), risk, confidence)
    header = {
        **sweep.header(model, name or model.name_or_path, drawn, settings, batch_size, max_new_tokens),
        "format": FORMAT,
        "calibration": {
            "risk": risk,
            "confidence": confidence,
            "loss": loss,
            "seed": seed,
            "drawn_from": len(data.items),
            **({"escalate": sorted(set(escalate), reverse=True)} if escalate else {}),
        },
    }
    if out.exists():
        result = read(out)
        check_same(result, header, out)
    else:
        sweep.check_lengths(model, processor, drawn, max_new_tokens)
        answerer = sweep.Answerer(model, processor, settings, max_new_tokens, how_sure=bool(escalate))
        with Journal(journal_of(out), header) as journal:
            records = _answered(journal, answerer, drawn, rules, header["calibration"], batch_size, progress)
        result = _result(header, drawn, rules, records, Prices(model, processor, drawn) if escalate else None)
        write_json(out, result)
    journal_of(out).unlink(missing_ok=True)
    return result


def budgets(
    k: Sequence[float] = (), keep: Sequence[float | int] = (), policy: str | Voter | None = None, **options: Any
) -> tuple[Setting, ...]:
    """The trims to test, the largest first.

    Raises:
        ConfigError: a value is out of range, or nothing says which of two budgets is the larger.
    """
    if k and keep:
        raise ConfigError("k and keep say how much stays in two ways that have no common order; give one of them.")
    if len({isinstance(value, int) for value in keep}) > 1:
        raise ConfigError(f"keep={list(keep)!r} has shares and numbers of features, which have no common order.")
    knob, values = ("k", k) if k else ("keep", keep or defaults.KEEPS)
    configs = [
        TrimConfig.from_dict({knob: value, "policy": policy, **options})
        for value in sorted(set(values), reverse=True)
    ]
    return tuple(Setting(name_of(config.decider), config) for config in configs)


def check(risk: float, confidence: float, loss: str) -> None:
    """Refuse what nothing can be tested by.

    Raises:
        ConfigError: a value is out of range.
    """
    exact.check_levels(risk, confidence)
    if loss not in defaults.LOSSES:
        raise ConfigError(f"loss={loss!r} must be one of {', '.join(map(repr, defaults.LOSSES))}.")


def draw(data: Dataset, questions: int | None, seed: int) -> Dataset:
    """So many of the questions, each as likely as any other, in their order.

    Raises:
        DatasetError: there are fewer.
    """
    there = len(data.items)
    count = min(there, defaults.CALIBRATED_ON) if questions is None else questions
    if count > there:
        raise DatasetError(
            f"{data.name} has {there} questions and {count} are to be drawn; give more, or draw fewer."
        )
    places = np.sort(np.random.default_rng(seed).permutation(there)[:count])
    return replace(data, items=tuple(data.items[place] for place in places))


def check_count(count: int, risk: float, confidence: float) -> None:
    """Refuse questions that are too few for the claim even if no answer changes.

    Raises:
        CalibrationError: it names how many are enough.
    """
    needed = exact.needed(risk, confidence)
    if count < needed:
        raise CalibrationError(
            f"{count} questions cannot support a risk of at most {risk} with confidence {confidence}, even if no "
            f"answer changes: that needs at least {needed}. Give more questions, or allow a higher risk."
        )


def _answered(
    journal: Journal,
    answerer: sweep.Answerer,
    drawn: Dataset,
    rules: Sequence[Rule],
    levels: Mapping[str, Any],
    batch_size: int,
    progress: sweep.Progress,
) -> list[Record]:
    """All records; a budget whose test is lost is asked no more, and neither are the smaller ones."""
    settings = answerer.settings
    most = exact.allowed(len(drawn.items), levels["risk"], levels["confidence"])
    done = {record["first"]: sweep.questions_of(record) for record in journal.distinct(sweep.questions_of)}
    lost: Counter[str] = Counter()

    def count(record: Record) -> None:
        first = record["first"]
        items = drawn.items[first : first + sweep.questions_of(record)]
        of_settings = rules[: len(settings)]
        for rule in of_settings:
            if rule.setting.label in record["predictions"]:
                lost[rule.label] += sum(rule.lost(record["predictions"], items, levels["loss"]))
        beaten = [place for place, rule in enumerate(of_settings) if lost[rule.label] > most]
        answerer.settings = settings[: min(beaten, default=len(settings))]

    for record in journal.distinct(sweep.questions_of):
        count(record)
    if answerer.settings:
        for record in answerer.records(drawn, batch_size, done, progress):
            journal.append(record)
            count(record)
            if not answerer.settings:
                break
    return journal.distinct(sweep.questions_of)


def _result(
    header: Mapping[str, Any],
    drawn: Dataset,
    rules: Sequence[Rule],
    records: Sequence[Record],
    prices: Prices | None,
) -> dict[str, Any]:
    """Header, answers, curve, and what follows."""
    levels = header["calibration"]
    visible = [count for record in records for count in record["visible"]]
    items = [
        {"id": item.id, "kind": item.kind, "question": item.question, "answers": list(item.answers)}
        for item in drawn.items
    ]
    sure = ("lowest_probability", "tokens") if prices else ()
    predictions: dict[str, dict[str, Any]] = {
        UNTRIMMED: {column: _joined(records, UNTRIMMED, column) for column in ("answer", *sure)}
    }
    for label in dict.fromkeys(rule.setting.label for rule in rules):
        predictions[label] = {column: _joined(records, label, column) for column in ("answer", "kept", *sure)}
    lost = [rule.lost(predictions, drawn.items, levels["loss"]) for rule in rules]
    if prices is None:
        for rule, of_rule in zip(rules, lost, strict=True):
            predictions[rule.label]["lost"] = of_rule
    kinds = [item.kind for item in drawn.items]
    curve = [
        _point(rule, predictions, of_rule, kinds, visible, levels, prices)
        for rule, of_rule in zip(rules, lost, strict=True)
    ]
    passed = exact.certified([row["lost"] for row in curve], len(items), levels["risk"], levels["confidence"])
    for place, row in enumerate(curve):
        row["certified"] = place < passed
    chosen = min(range(passed), key=lambda place: (curve[place]["kept_fraction"], -place), default=None)
    return {
        **json.loads(json.dumps(header)),
        "items": items,
        "visible": visible,
        "predictions": predictions,
        "curve": curve,
        "allowed": exact.allowed(len(items), levels["risk"], levels["confidence"]),
        "chosen": None if chosen is None else _chosen(rules[chosen]),
        "refusal": None if chosen is not None else _refusal(curve[0], len(items), levels),
    }


def _chosen(rule: Rule) -> dict[str, Any]:
    told = {"label": rule.label, "config": rule.setting.config.to_dict()}
    return told if rule.below is None else {**told, "escalate": rule.below}


def _joined(records: Sequence[Record], label: str, column: str) -> list[Any]:
    parts = [record["predictions"][label][column] for record in records if label in record["predictions"]]
    return [one for part in parts for one in part]


def _point(
    rule: Rule,
    predictions: Mapping[str, Mapping[str, Sequence[Any]]],
    lost: Sequence[bool],
    kinds: Sequence[str],
    visible: Sequence[int],
    levels: Mapping[str, Any],
    prices: Prices | None,
) -> dict[str, Any]:
    """One rule of the curve: what was lost, and what that says about its risk, also of each kind of question."""
    prediction = predictions[rule.setting.label]
    again = rule.again(prediction)
    # An answer that is made again untrimmed keeps everything besides.
    pairs = zip(prediction["kept"], visible, again, strict=False)
    shares = [kept / seen + twice for kept, seen, twice in pairs]

    def numbers(places: Sequence[int]) -> dict[str, Any]:
        asked = [place for place in places if place < len(lost)]
        fewest = sum(lost[place] for place in asked)
        # What was not asked, because the test was lost, may have gone either way.
        most = fewest + len(places) - len(asked)
        low, high = exact.interval(fewest, most, len(places), levels["confidence"])
        bound = exact.upper(most, len(places), 1 - levels["confidence"])
        told: dict[str, Any] = {
            "questions": len(places),
            "asked": len(asked),
            "lost": fewest,
            "low": low,
            "high": high,
            "bound": bound,
        }
        if prices is not None and asked:
            told["escalated"] = sum(again[place] for place in asked)
            told["kept_fraction"] = round(float(np.mean([shares[place] for place in asked])), 6)
            told["cost"] = prices.shares(predictions[UNTRIMMED], prediction, again, asked)
        return told

    of_kind: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        of_kind.setdefault(kind, []).append(place)
    return {
        "label": rule.label,
        "k": rule.setting.config.k,
        "keep": rule.setting.config.keep,
        **({} if rule.below is None else {"escalate": rule.below}),
        "kept_fraction": round(float(np.mean(shares)), 6),
        **numbers(range(len(kinds))),
        "kinds": {kind: numbers(places) for kind, places in of_kind.items()},
    }


def _refusal(largest: Mapping[str, Any], count: int, levels: Mapping[str, Any]) -> str:
    risk, confidence = levels["risk"], levels["confidence"]
    most = exact.allowed(count, risk, confidence)
    more = exact.needed_at(largest["lost"] / largest["asked"], risk, confidence)
    remedy = "Give a larger budget, or allow a higher risk"
    if more is not None:
        remedy += f"; if answers go on changing as often, about {more} questions would support the claim"
    return (
        f"the largest budget, {largest['label']}, lost {largest['lost']} of {largest['asked']} answers; for a risk "
        f"of at most {risk} with confidence {confidence} it may lose {most} of {count}. {remedy}."
    )
