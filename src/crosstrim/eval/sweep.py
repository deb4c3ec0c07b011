"""Ask every question of the untrimmed model and under every setting, in a run that can be killed and goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from crosstrim.asking import answering
from crosstrim.asking.batches import Encoder
from crosstrim.asking.escalation import Escalation, Settled
from crosstrim.asking.inputs import Inputs
from crosstrim.config import TrimConfig
from crosstrim.data.dataset import Dataset, Item
from crosstrim.data.journal import Journal, Record, check_same, journal_of
from crosstrim.errors import InputError, ResultError
from crosstrim.eval import metrics, oracle, provenance, summary
from crosstrim.eval.defaults import DATA_TOKENS
from crosstrim.eval.items import asked
from crosstrim.eval.settings import ORACLE, UNTRIMMED, Setting
from crosstrim.files import read_json, write_json
from crosstrim.method.policies import Given
from crosstrim.method.quantisation import share_of_bytes
from crosstrim.models import mllama

FORMAT = 1
MAX_NEW_TOKENS = DATA_TOKENS

Progress = Callable[[int, int], None]


def run(
    model: Any,
    processor: Any,
    dataset: Dataset,
    settings: Sequence[Setting],
    out: Path,
    *,
    name: str,
    batch_size: int = 32,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Answer, compare and write the result; called again after a kill, go on where the last batch ended.

    What was answered is written to a journal beside `out` after every batch. The journal turns into `out` when all
    is done.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        dataset: what to ask.
        settings: of `settings.expand`; the untrimmed model always runs.
        out: the file to write.
        name: of the model, for the result.
        batch_size: questions answered together.
        max_new_tokens: where to cut answers off.
        progress: called with how many answers are done, and of how many.

    Returns:
        The result as plain JSON types, as it is in `out`.

    Raises:
        ResultError: `out` or its journal belongs to a run of something else, or cannot be written.
        InputError: a question does not fit into the model with its answer.
    """
    run_of = header(model, name, dataset, settings, batch_size, max_new_tokens)
    journal_path = journal_of(out)
    if out.exists():
        result = read(out)
        check_same(result, run_of, out)
    else:
        check_lengths(model, processor, dataset, max_new_tokens)
        with Journal(journal_path, run_of) as journal:
            done = {record["first"]: questions_of(record) for record in journal.distinct(questions_of)}
            answerer = Answerer(model, processor, settings, max_new_tokens)
            for record in answerer.records(dataset, batch_size, done, progress):
                journal.append(record)
            result = _result(run_of, dataset, settings, journal.distinct(questions_of))
        write_json(out, result)
    journal_path.unlink(missing_ok=True)
    return result


def check_path(out: Path) -> None:
    """Refuse, before any work is done, a file that no result can be written to.

    Raises:
        ResultError: it is no .json, or its folder is not there.
    """
    if out.suffix.lower() != ".json" or out.is_dir():
        raise ResultError(f"{out} cannot hold a result; give a file that ends in .json.")
    if not out.parent.is_dir():
        raise ResultError(f"{out} lies in a folder that does not exist; create {out.parent} first.")


def read(path: Path) -> dict[str, Any]:
    """Read a finished result.

    Raises:
        ResultError: it is none, or of another format.
    """
    result = read_json(path)
    if not isinstance(result, dict) or "summary" not in result:
        raise ResultError(f"{path} is no result of crosstrim eval --out.")
    if result.get("format") != FORMAT:
        raise ResultError(f"{path} has format {result.get('format')!r}, this crosstrim reads {FORMAT}; run it anew.")
    return result


def without_answers(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result's numbers and everything they depend on, which fits a screen."""
    return {name: value for name, value in result.items() if name not in ("items", "visible", "predictions")}


def check_lengths(model: Any, processor: Any, dataset: Dataset, max_new_tokens: int) -> None:
    """Refuse questions of which one does not fit into the model with its answer.

    Raises:
        InputError: it names the question.
    """
    for item in dataset.items:
        try:
            answering.check_question(model, processor, item.question, max_new_tokens)
        except InputError as error:
            raise InputError(f"the question with the id {item.id!r} cannot be asked: {error}") from error


class Answerer:
    """Answers batches of questions: first untrimmed, then under every setting.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        settings: of `settings.expand`.
        max_new_tokens: where to cut answers off.
        how_sure: whether to tell how sure every answer was, as is done where a setting has an escalation.

    Attributes:
        settings: that the next batch is asked under; who needs no more of one takes it out.
    """

    def __init__(
        self, model: Any, processor: Any, settings: Sequence[Setting], max_new_tokens: int, how_sure: bool = False
    ) -> None:
        self._how_sure = how_sure or any(setting.escalation for setting in settings)
        self._model = model
        self._processor = processor
        self._encoder = Encoder(model, processor)
        self.settings = settings
        self._max_new_tokens = max_new_tokens

    def records(
        self,
        dataset: Dataset,
        batch_size: int,
        done: Mapping[int, int] = MappingProxyType({}),
        progress: Progress = lambda done, total: None,
    ) -> Iterator[Record]:
        """Answer batch by batch.

        Args:
            dataset: what to ask.
            batch_size: questions answered together.
            done: how many questions are answered already, by the place of the first of each of their batches.
            progress: called with how many answers are done, and of how many.

        Returns:
            Per batch the place of its `first` question, how many features are `visible` to each question, and per
            label `seconds` and `predictions`: `answer`, and but for the untrimmed model `kept`, `kl`, and `layers`
            where the policy makes later layers read less. Where unsure answers are made again, `kept` is what all
            attempts kept together, and `escalated` says where; `lowest_probability` and `tokens` are the first one's.
        """
        models = 1 + len(self.settings)
        told, total = sum(done.values()) * models, len(dataset.items) * models
        progress(told, total)
        for first in range(0, len(dataset.items), batch_size):
            if first in done:
                continue
            batch = dataset.items[first : first + batch_size]
            told += len(batch) * (models - 1 - len(self.settings))  # of settings that were taken out
            record: Record = {"first": first, "visible": [], "seconds": {}, "predictions": {}}
            for label, found, columns in self.answer(batch):
                record["visible"] = columns.pop("visible", record["visible"])
                record["predictions"][label] = {"answer": [one.text for one in found], **columns}
                record["seconds"][label] = round(max(one.seconds for one in found), 4)
                told += len(batch)
                progress(told, total)
            yield record

    def answer(self, batch: Sequence[Item]) -> Iterator[tuple[str, Sequence[Settled], dict[str, list[Any]]]]:
        """Per setting: its label, what it gave, and in columns what that is beside the untrimmed model's."""
        with asked(self._encoder, batch, self._max_new_tokens) as inputs:
            untrimmed = self._settle(inputs, None, None)
            yield UNTRIMMED, untrimmed, self._sureness(untrimmed)
            votes = None
            if any(setting.policy == ORACLE for setting in self.settings):
                tokens = torch.stack([one.tokens for one in untrimmed])
                votes = oracle.votes(self._model, inputs, tokens)
            for setting in self.settings:
                config = setting.config
                if setting.policy == ORACLE and votes is not None:
                    config = replace(config, policy=Given(votes))
                found = self._settle(inputs, config, setting.escalation)
                columns = _again(found) if setting.escalation else _kept(found, config)
                first, last = (torch.stack([one.logits for one in settled]) for settled in (untrimmed, found))
                columns["kl"] = [float(f"{one:.6g}") for one in metrics.divergence(first, last)]
                yield setting.label, found, columns | self._sureness(found)

    def _settle(self, inputs: Inputs, config: TrimConfig | None, escalation: Escalation | None) -> Sequence[Settled]:
        escalation = escalation or (Escalation(1.0, ()) if self._how_sure else None)
        limit = self._max_new_tokens
        return answering.settle(self._model, self._processor, inputs, config, escalation, limit)

    def _sureness(self, found: Sequence[Settled]) -> dict[str, list[Any]]:
        if not self._how_sure:
            return {}
        first = [one.attempts[0] for one in found]
        lowest = [round(one.lowest_probability, 6) for one in first]
        return {"lowest_probability": lowest, "tokens": [one.tokens for one in first]}


def _kept(found: Sequence[Settled], config: TrimConfig) -> dict[str, list[Any]]:
    images = [image for one in found for image in one.images]
    columns: dict[str, list[Any]] = {name: [getattr(image, name) for image in images] for name in ("visible", "kept")}
    if set(config.voters().shares(len(images[0].layers) - 1)) - {1.0}:
        columns["layers"] = [list(image.layers) for image in images]
    return columns


def _again(found: Sequence[Settled]) -> dict[str, list[Any]]:
    return {
        "visible": [one.attempts[0].visible for one in found],
        "kept": [sum(attempt.kept for attempt in one.attempts) for one in found],
        "escalated": [len(one.attempts) > 1 for one in found],
    }


def questions_of(record: Record) -> int:
    """How many questions a record of `Answerer.records` is of."""
    return len(record["predictions"][UNTRIMMED]["answer"])


def header(
    model: Any, name: str, dataset: Dataset, settings: Sequence[Setting], batch_size: int, max_new_tokens: int
) -> dict[str, Any]:
    """Everything the answers depend on."""
    return {
        "format": FORMAT,
        "dataset": provenance.of_dataset(dataset),
        "model": {**provenance.of_model(model, name), "head_size": mllama.locate(model).geometry.head_size},
        "generation": {"max_new_tokens": max_new_tokens, "do_sample": False, "batch_size": batch_size},
        "settings": [setting.to_dict() for setting in settings],
        **provenance.of_software(model),
    }


def _result(
    header: Mapping[str, Any], dataset: Dataset, settings: Sequence[Setting], records: Sequence[Record]
) -> dict[str, Any]:
    """Header, answers and summary."""
    model, found = header["model"], collected(dataset, records)
    items = [
        {"id": item.id, "kind": item.kind, "question": item.question, "answers": item.answers, "visible": count}
        for item, count in zip(dataset.items, found["visible"], strict=True)
    ]
    kv_share = partial(share_of_bytes, row=model["head_size"], dtype=getattr(torch, model["dtype"]))
    return {
        **json.loads(json.dumps(header)),
        "items": json.loads(json.dumps(items)),
        "predictions": found["predictions"],
        "seconds": found["seconds"],
        "summary": summary.summarise(
            items, found["predictions"], settings, model["cross_attention_layers"], kv_share
        ),
    }


def collected(dataset: Dataset, records: Sequence[Record]) -> Record:
    """The columns of all records in one: also which answers are `right`; seconds are summed."""
    predictions: dict[str, dict[str, list[Any]]] = {}
    for label, names in records[0]["predictions"].items():
        parts = [record["predictions"][label] for record in records]
        predictions[label] = {name: [one for part in parts for one in part[name]] for name in names}
        pairs = zip(predictions[label]["answer"], dataset.items, strict=True)
        predictions[label]["right"] = [metrics.is_right(text, item.answers) for text, item in pairs]
    return {
        "visible": [count for record in records for count in record["visible"]],
        "predictions": predictions,
        "seconds": {label: round(sum(one["seconds"][label] for one in records), 2) for label in predictions},
    }
