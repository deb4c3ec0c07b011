"""What somebody's typed program does with crosstrim: mypy (strict) and pyright read it; nothing runs it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import crosstrim
from crosstrim import Answer, FeatureCache, Session, TrimConfig, TrimHandle, TrimReport, errors, mini, policies


class Strongest(policies.Policy):
    def __call__(self, evidence: policies.Evidence) -> torch.Tensor:
        return evidence.saliency.amax(1, keepdim=True)


def describe(report: TrimReport) -> str:
    kept = [image.kept for images in report.samples for image in images]
    return f"{sum(kept)} of {report.visible} features, {report.kv_bytes} bytes"


def ask(picture: Path, questions: list[str]) -> list[str]:
    model, processor = crosstrim.load("mini")
    session = Session(model, processor, Image.open(picture), k=0.25, cache=FeatureCache(max_bytes=1 << 20))
    answers: list[Answer] = [session.ask(question) for question in questions]
    return [answer.answer for answer in answers]


def main() -> int:
    model, _ = crosstrim.load(mini.path())
    try:
        config = TrimConfig.from_dict(TrimConfig(keep=0.5, policy="mmr").to_dict())
        handle: TrimHandle = crosstrim.trim(model, config)
    except errors.CrosstrimError as error:
        print(error)
        return 1
    with handle.disabled():
        pass
    handle.remove()
    with crosstrim.trim(model, keep=0.2, policy=Strongest()) as trimmed:
        print(describe(trimmed.report()))
    return len(crosstrim.compat.check(model))
