"""Requests, the engine runs that answer them, and what crosstrim on transformers answers."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

import crosstrim
from crosstrim import mini
from tests.support import processes

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",  # SGLang's own accounting: held and free slots must add up
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",  # and no slot may be free twice, or both held and free
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
TRIMMED = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "crosstrim.engines.sglang"}


@dataclass(frozen=True)
class Run:
    """What an engine gave: per batch the answers, and its log."""

    batches: list[list[dict[str, Any]]]
    log: str

    def tokens(self, batch: int) -> list[list[int]]:
        return [answer["tokens"] for answer in self.batches[batch]]

    def prompt_tokens(self, batch: int) -> list[int]:
        return [answer["prompt_tokens"] for answer in self.batches[batch]]

    @property
    def most_in_flight(self) -> int:
        return max(int(count) for count in re.findall(r"Decode batch.*?#running-req: (\d+)", self.log))

    @property
    def retracted(self) -> int:
        return sum(int(count) for count in re.findall(r"#retracted_reqs: (\d+)", self.log))

    @property
    def slots_in_use_at_the_end(self) -> int:
        return int(re.findall(r"Decode batch.*?#token: (\d+)", self.log)[-1])


def run(
    folder: Path,
    model: Path,
    *batches: list[dict[str, Any]],
    trim: dict[str, Any] | None,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> Run:
    """Start an engine in a process of its own, let it answer the batches, stop it. `trim=None` is SGLang's own model.

    The process is forked, and so are those that it starts; `test_server.py` has them started as users do.
    """
    import sglang.srt.entrypoints.engine  # noqa: F401 - here, lest each process spends ten seconds on it

    resource_tracker.ensure_running()  # nor starts one of these
    answers = folder / "answers.json"
    settings = {} if trim is None else {"json_model_override_args": json.dumps({"crosstrim": trim})}
    environment = {**ENVIRONMENT, **({} if trim is None else TRIMMED), **(environment or {})}
    spec = {"model_path": str(model), **settings, **engine}
    log = processes.run(_answer, spec, batches, answers, log=folder / "log.txt", environment=environment)
    return Run(json.loads(answers.read_text()), log)


def _answer(spec: dict[str, Any], batches: tuple[list[dict[str, Any]], ...], answers: Path) -> None:
    engine = _start(spec)
    given = []
    for requests in batches:
        outputs = engine.generate(
            [request["prompt"] for request in requests],
            [{"temperature": 0, "max_new_tokens": request["tokens"], "ignore_eos": True} for request in requests],
            image_data=[request["images"] or None for request in requests],
        )
        given.append(
            [
                {"tokens": list(output["output_ids"]), "prompt_tokens": output["meta_info"]["prompt_tokens"]}
                for output in outputs
            ]
        )
    engine.shutdown()
    answers.write_text(json.dumps(given))


def _start(spec: dict[str, Any]) -> Any:
    from sglang.srt.entrypoints import engine
    from sglang.srt.environ import envs
    from sglang.srt.managers import scheduler

    assert "sglang.srt.models.registry" not in sys.modules  # it reads the environment when it is imported
    scheduler.TEST_RETRACT = envs.SGLANG_TEST_RETRACT.get()  # and so did this
    engine.mp.set_start_method("fork", force=True)
    engine.mp.set_start_method = lambda *_, **__: None  # SGLang would have its processes spawned
    return engine.Engine(
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        page_size=1,
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        skip_server_warmup=True,
        decode_log_interval=1,
        log_level="info",
        **spec,
    )


def request(processor: Any, question: str, images: list[str], tokens: int) -> dict[str, Any]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return {"prompt": prompt, "images": images, "tokens": tokens}


def mixed(processor: Any, count: int, tokens: int) -> list[dict[str, Any]]:
    """Four tiles, one tile and text alone in turn, so that each follows each in a batch; two pictures at the end."""
    rows = {layout: [row for row in mini.heldout() if row["layout"] == layout] for layout in ("1x1", "2x2")}
    requests = []
    for place in range(count):
        big, small = rows["2x2"][8 * place], rows["1x1"][8 * place + 1]
        requests += [
            request(processor, big["question"], [big["image"]], tokens),
            request(processor, small["question"], [small["image"]], tokens),
            request(processor, small["question"], [], tokens),
        ]
    return [*requests, request(processor, big["question"], [small["image"], big["image"]], tokens)]


def reference(model: Any, processor: Any, requests: list[dict[str, Any]], **options: Any) -> list[list[int]]:
    """What crosstrim on transformers generates, one request at a time, whatever the end-of-text token says."""
    model.generation_config.eos_token_id = None
    answers = []
    with crosstrim.trim(model, **options), torch.no_grad():
        for one in requests:
            images = [Image.open(path).convert("RGB") for path in one["images"]]
            inputs = processor(
                images=images or None, text=one["prompt"], add_special_tokens=False, return_tensors="pt"
            )
            output = model.generate(**inputs, max_new_tokens=one["tokens"], do_sample=False)
            answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def processor_of(folder: Path) -> Any:
    """The processor as SGLang loads it, whose pixels are not quite those of `crosstrim.load`'s."""
    return AutoProcessor.from_pretrained(folder)
