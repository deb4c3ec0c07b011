"""What a model answers and keeps under many settings; as a program, one of the processes that share a model.

`torchrun --nproc-per-node 2 -m tests.support.parallel_worker CHECKPOINT FOLDER` writes 0.json and 1.json to FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Picture

import crosstrim
from crosstrim import mini
from crosstrim.errors import UnsupportedModelError
from crosstrim.eval import watch
from crosstrim.models import mllama
from tests.support import tiny
from tests.support.passes import split_turns
from tests.support.tiny import Image

SETTINGS: dict[str, dict[str, Any]] = {
    "lossless": {},
    "k": {"k": 0.1},
    "keep": {"keep": 0.3},
    "union, exact budget": {"keep": 9, "policy": "union"},
    "mmr": {"keep": 9, "policy": "mmr"},
    "dpp": {"keep": 9, "policy": "dpp"},
    "mean": {"k": 0.1, "policy": "mean"},
    "value": {"k": 0.1, "policy": "value"},
    "mass": {"policy": "mass:0.5"},
    "pyramid": {"keep": 0.3, "policy": "pyramid"},
    "eight bits": {"k": 0.1, "kv_dtype": "int8"},
    "merged": {"keep": 9, "merge": True},
    "merged, pyramid": {"keep": 0.3, "policy": "pyramid", "merge": True},
    "first layer whole": {"k": 0.1, "trim_first_layer": False},
}


def tokens_and_kept(model, inputs, options: dict[str, Any]) -> list[Any]:
    with crosstrim.trim(model, **options) as trimmed:
        output = model.generate(**inputs, max_new_tokens=10)
        kept = [[image.kept_indices for image in sample] for sample in trimmed.report().samples]
    return [output.tolist(), kept]


def appended_image(model) -> list[Any]:
    """The best tokens and the kept features when the second image comes in a pass of its own."""
    first, second = split_turns(tiny.inputs([3, Image(2, seed=1), 4, Image(3, seed=2), 5]), 9)
    with crosstrim.trim(model, k=0.1) as trimmed, torch.no_grad():
        cache = model(**first).past_key_values
        best = model(**second, past_key_values=cache).logits.argmax(-1)
        return [best.tolist(), [[image.kept_indices for image in sample] for sample in trimmed.report().samples]]


def answers(model) -> dict[str, Any]:
    """Per setting the tokens and the kept features of the random model."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, tiny.PAD
    inputs = tiny.inputs([3, Image(2, seed=1), 6], [Image(4, seed=2), 4])
    found: dict[str, Any] = {"untrimmed": model.generate(**inputs, max_new_tokens=10).tolist()}
    found |= {name: tokens_and_kept(model, inputs, options) for name, options in SETTINGS.items()}
    return found | {"appended image": appended_image(model)}


def answers_of_mini(tp: int = 1) -> list[Any]:
    """Tokens and kept features of the embedded model's first example."""
    model, processor = crosstrim.load("mini", tp=tp)
    example = mini.examples()[0]
    content = [{"type": "image"}, {"type": "text", "text": example["questions"][0]["question"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Picture.open(example["image"])
    inputs = processor(images=picture, text=prompt, add_special_tokens=False, return_tensors="pt")
    return tokens_and_kept(model, inputs, {"k": 0.05})


def scores(model) -> torch.Tensor:
    """Saliency in the second cross-attention layer, as analysis reads it."""
    located = mllama.locate(model)
    return watch.run(located, located.followers[:1], tiny.inputs([3, Image(2, seed=1), 6])).scores[0]


class Capricious:
    """A policy that never votes alike twice, least of all in two processes."""

    def __call__(self, evidence):
        return torch.rand(evidence.visible.shape).unsqueeze(1)


def refusal_of_heads_elsewhere(model) -> str:
    """What trim says of a model that was divided in a way nobody can tell."""
    attention = mllama.locate(model).leader.cross_attn
    held, attention.num_key_value_heads = attention.num_key_value_heads, 1
    try:
        crosstrim.trim(model, k=0.1)
    except UnsupportedModelError as error:
        return str(error)
    finally:
        attention.num_key_value_heads = held
    return ""


def main(checkpoint: str, folder: Path) -> None:
    torch.set_num_threads(1)
    model, _ = crosstrim.load(checkpoint, tp=2)
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    inputs = tiny.inputs([3, Image(2, seed=1), 6])
    found = {
        "answers": answers(model),
        "mini": answers_of_mini(tp=2),
        "scores": scores(model).tolist(),
        "capricious": tokens_and_kept(model, inputs, {"keep": 9, "policy": Capricious()})[1],
        "refusal": refusal_of_heads_elsewhere(model),
        "heads": mllama.locate(model).leader.cross_attn.num_heads,
        "weights": sum(getattr(one, "_local_tensor", one).numel() for one in model.parameters()),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
