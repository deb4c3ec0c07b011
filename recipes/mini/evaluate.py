"""Accuracy of a checkpoint: real processor, real `generate`, greedy. Run `python -m recipes.mini.evaluate`."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from recipes.training.files import others_alike
from torch import Tensor, nn
from tqdm import tqdm
from transformers import MllamaForConditionalGeneration, MllamaProcessor

import crosstrim
from crosstrim import FeatureCache, mini
from crosstrim.method.policies import Random
from crosstrim.models import compat, vision

from .questions import LOOKUPS

_BATCH = 64
_NEW_TOKENS = 12
_KEEP = 0.07
_RANDOM_SEEDS = (0, 1, 2)
RESULTS = Path("evaluation/results/mini-heldout.json")
_TRIMS: dict[str, dict[str, Any]] = {
    "k=0.25": {"k": 0.25},
    "keep=0.07 union": {"keep": _KEEP, "policy": "union"},
    "keep=0.07 random": {"keep": _KEEP, "policy": Random(_RANDOM_SEEDS[0])},
}
_REPAIRS: dict[str, tuple[str, ...]] = {
    "without vision_features": ("blind_rows",),
    "without blind_rows": ("vision_features",),
    "without both": (),
}
Rows = list[dict[str, Any]]


def load(folder: Path) -> tuple[MllamaForConditionalGeneration, MllamaProcessor]:
    """Return the checkpoint that ships, its bfloat16 weights held in float32, without any compat repair."""
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), MllamaProcessor.from_pretrained(folder)


def read_rows(path: Path) -> Rows:
    """Return the questions of a benchmark written by `heldout.write_benchmark`, with absolute picture paths."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{**row, "image": str(path.parent / row["image"])} for row in rows]


def _inputs(processor: MllamaProcessor, rows: Rows, pictures: list[str]) -> dict[str, Tensor]:
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
            add_generation_prompt=True,
        )
        for row in rows
    ]
    images = [[Image.open(picture).convert("RGB")] for picture in pictures]
    return processor(images=images, text=prompts, add_special_tokens=False, padding=True, return_tensors="pt")


@torch.no_grad()
def answers(
    model: MllamaForConditionalGeneration,
    processor: MllamaProcessor,
    rows: Rows,
    blind: bool = False,
    before: Callable[[dict[str, Tensor]], None] = lambda inputs: None,
) -> list[str]:
    """Return the model's greedy answer to every question.

    Args:
        model: The model, trimmed or not.
        processor: Its processor.
        rows: The questions.
        blind: Whether to show another picture of the same layout than the one that is asked about.
        before: Called with the inputs of each batch before its generation.
    """
    texts: list[str] = []
    features = FeatureCache()
    others = others_alike(rows, "layout") if blind else {}
    shown = [others.get(row["image"], row["image"]) for row in rows]
    for start in tqdm(range(0, len(rows), _BATCH), desc="answers", mininterval=5, leave=False):
        part = slice(start, start + _BATCH)
        inputs = _inputs(processor, rows[part], shown[part])
        with vision.given(model, features.features(model, inputs)):
            before(inputs)
            output = model.generate(**inputs, max_new_tokens=_NEW_TOKENS)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _values(rows: Rows, field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def score(rows: Rows, texts: list[str]) -> dict[str, Any]:
    """Return per cent right: by kind, by layout, over the lookups and over everything."""
    right = [text in row["answers"] for row, text in zip(rows, texts, strict=True)]

    def share(field: str, wanted: Sequence[str]) -> float:
        chosen = [ok for row, ok in zip(rows, right, strict=True) if row[field] in wanted]
        return round(100 * sum(chosen) / len(chosen), 1)

    return {
        "kinds": {kind: share("kind", [kind]) for kind in _values(rows, "kind")},
        "layouts": {layout: share("layout", [layout]) for layout in _values(rows, "layout")},
        "lookups": share("kind", LOOKUPS),
        "all": round(100 * sum(right) / len(right), 1),
    }


class _OnlyKept:
    """Hides all but the kept features from EVERY cross-attention layer, the first too, at prefill and after.

    `crosstrim.trim` lets the first layer see everything once, which flatters every choice of features alike; this is
    the stricter protocol. The kept set is found by a trimmed prefill, then the same prompt runs with the rest masked.
    """

    def __init__(self, model: MllamaForConditionalGeneration, policy: Any) -> None:
        self._model, self._policy = model, policy
        self._kept: Tensor | None = None

    def choose(self, inputs: dict[str, Tensor]) -> None:
        """Find which features the policy keeps for this batch."""
        self._kept = None
        with crosstrim.trim(self._model, keep=_KEEP, policy=self._policy) as handle:
            self._model.generate(**inputs, max_new_tokens=1)
        samples = handle.report().to_dict()["samples"]
        features = self._model.config.vision_config.max_num_tiles * self._model.model.vision_model.num_patches
        kept = torch.zeros(len(samples), features, dtype=torch.bool)
        for row, sample in zip(kept, samples, strict=True):
            row[sample["images"][0]["kept_indices"]] = True
        self._kept = kept

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._kept is not None:
            mask = kwargs["attention_mask"]
            kwargs["attention_mask"] = mask.masked_fill(~self._kept[:, None, None], torch.finfo(mask.dtype).min)
        return args, kwargs

    def __enter__(self) -> _OnlyKept:
        layers = self._model.model.language_model.layers
        modules = [layers[index].cross_attn for index in self._model.config.text_config.cross_attention_layers]
        self._handles = [module.register_forward_pre_hook(self, with_kwargs=True) for module in modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _strict(
    model: MllamaForConditionalGeneration, processor: MllamaProcessor, rows: Rows, policy: Any
) -> dict[str, Any]:
    with _OnlyKept(model, policy) as hook:
        return score(rows, answers(model, processor, rows, before=hook.choose))


def evaluate_trims(model: MllamaForConditionalGeneration, processor: MllamaProcessor, rows: Rows) -> dict[str, Any]:
    """Return accuracy untrimmed, blind, at the paper's knob, and at a small exact budget against chance."""
    results = {"untrimmed": score(rows, answers(model, processor, rows))}
    results["blind"] = score(rows, answers(model, processor, rows, blind=True))
    for name, options in _TRIMS.items():
        with crosstrim.trim(model, **options) as handle:
            results[name] = score(rows, answers(model, processor, rows))
            samples = handle.report().to_dict()["samples"]
        images = [image for sample in samples for image in sample["images"]]
        results[name]["kept_in_last_batch"] = round(
            sum(i["kept"] for i in images) / sum(i["visible"] for i in images), 3
        )
    results["keep=0.07 union, first layer too"] = _strict(model, processor, rows, "union")
    for seed in _RANDOM_SEEDS:
        results[f"keep=0.07 random (seed {seed}), first layer too"] = _strict(model, processor, rows, Random(seed))
    return results


def evaluate_compat(folder: Path, processor: MllamaProcessor, rows: Rows) -> dict[str, Any]:
    """Return accuracy with each repair of `crosstrim.compat` alone, and with none: what each departure costs."""
    results = {}
    for name, repairs in _REPAIRS.items():
        model, _ = load(folder)
        for repair in repairs:
            compat.apply(model, only=repair)
        results[name] = score(rows, answers(model, processor, rows))
    return results


def versions() -> dict[str, str]:
    """Return what a result depends on."""
    register = Path("/proc/cpuinfo")
    lines = register.read_text().splitlines() if register.exists() else []
    cpu = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "crosstrim": crosstrim.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "cpu": cpu,
    }


def evaluate(checkpoint: Path, questions: Path) -> dict[str, Any]:
    """Return everything that the model card tells about a checkpoint, measured on one benchmark."""
    begun = time.monotonic()
    rows = read_rows(questions)
    model, processor = load(checkpoint)
    compat.apply(model)
    results = evaluate_trims(model, processor, rows) | evaluate_compat(checkpoint, processor, rows)
    return {
        "what": "per cent of held-out questions answered exactly right, greedy, float32 on bfloat16 weights",
        "questions": {kind: sum(row["kind"] == kind for row in rows) for kind in _values(rows, "kind")},
        "generation": {"max_new_tokens": _NEW_TOKENS, "batch": _BATCH, "do_sample": False},
        "compat": "vision_features and blind_rows repaired unless a result says otherwise",
        "results": results,
        "versions": versions(),
        "seconds": round(time.monotonic() - begun),
    }


def brief(checkpoint: Path, questions: Path) -> dict[str, Any]:
    """Return the untrimmed accuracy alone."""
    rows = read_rows(questions)
    model, processor = load(checkpoint)
    compat.apply(model)
    return score(rows, answers(model, processor, rows))


def main() -> None:
    """Evaluate a checkpoint and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=mini.path())
    parser.add_argument("--questions", type=Path, default=mini.path().parent / "heldout" / "questions.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--brief", action="store_true", help="only the untrimmed accuracy, printed")
    options = parser.parse_args()
    if options.brief:
        print(json.dumps(brief(options.checkpoint, options.questions), indent=2))
        return
    write(evaluate(options.checkpoint, options.questions), options.out)


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
