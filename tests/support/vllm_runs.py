"""Engines of vLLM in this process, what to ask them, and what crosstrim on transformers answers."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import crosstrim
from crosstrim import mini

BLOCK = 32
TIE = 1e-4  # in logits; below it the last bits of a sum decide


@dataclass(frozen=True)
class Request:
    ids: list[int]
    images: tuple[str, ...]
    tokens: int
    options: Any = None

    def prompt(self) -> dict[str, Any]:
        """As vLLM takes it."""
        prompt: dict[str, Any] = {"prompt_token_ids": self.ids}
        if self.images:
            prompt["multi_modal_data"] = {"image": [Image.open(path).convert("RGB") for path in self.images]}
        if self.options is not None:
            prompt["mm_processor_kwargs"] = self.options
        return prompt


class Engine:
    """An engine and its scheduler, whose every step is noted."""

    def __init__(self, model: Path, trim: dict[str, Any], **options: Any) -> None:
        from vllm import LLM

        defaults = {"dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": 2048, "max_num_seqs": 64}
        defaults |= {"block_size": BLOCK, "num_gpu_blocks_override": 400, "kv_cache_memory_bytes": 64 << 20}
        defaults |= {"enforce_eager": True}
        self.llm = LLM(str(model), hf_overrides={"crosstrim": trim}, **{**defaults, **options})
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.forget()
        self._watch()

    def forget(self) -> None:
        """Note anew."""
        self.most_in_flight = self.preemptions = self.resumed_with_new = 0
        self.cross_blocks: dict[str, int] = {}

    def _watch(self) -> None:
        from vllm.v1.core.single_type_kv_cache_manager import CrossAttentionManager

        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        (self.cross,) = (manager for manager in managers if isinstance(manager, CrossAttentionManager))

        def watched(*args: Any, **options: Any) -> Any:
            output = schedule(*args, **options)
            self.most_in_flight = max(self.most_in_flight, len(output.num_scheduled_tokens))
            resumed = set(output.scheduled_cached_reqs.resumed_req_ids)
            self.resumed_with_new += bool(resumed and output.scheduled_new_reqs)
            for name in output.num_scheduled_tokens:
                self.cross_blocks[name] = len(self.cross.req_to_blocks.get(name, ()))
            return output

        def counted(*args: Any, **options: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **options)

        self.scheduler.schedule, self.scheduler._preempt_request = watched, counted

    @property
    def network(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def blocks(self) -> int:
        """All but the one that holds nothing."""
        return self.scheduler.kv_cache_config.num_blocks - 1

    def answer(self, requests: Sequence[Request], **sampling: Any) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = {"temperature": 0, "ignore_eos": True, **sampling}
        outputs = self.llm.generate(
            [request.prompt() for request in requests],
            [SamplingParams(max_tokens=request.tokens, **sampling) for request in requests],
            use_tqdm=False,
        )
        self.finished = outputs
        return [list(output.outputs[0].token_ids) for output in outputs]

    def join_one_after_the_other(self, requests: Sequence[Request]) -> list[list[int]]:
        """Another request every second step, while those before it are being decoded."""
        from vllm import SamplingParams

        engine, waiting, done = self.llm.llm_engine, list(enumerate(requests)), {}
        step = 0
        while waiting or engine.has_unfinished_requests():
            if waiting and step % 2 == 0:
                place, request = waiting.pop(0)
                sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=request.tokens)
                engine.add_request(str(place), request.prompt(), sampling)
            done |= {int(out.request_id): out for out in engine.step() if out.finished}
            step += 1
        return [list(done[place].outputs[0].token_ids) for place in range(len(requests))]

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.scheduler, self.cross


@contextlib.contextmanager
def one_engine_at_a_time() -> Iterator[Callable[..., Engine]]:
    """Starts engines, of which only the latest lives; what it was asked for last time goes on, unless `anew`."""
    from vllm.distributed import cleanup_dist_env_and_memory

    running: list[tuple[Any, Engine]] = []

    def stop() -> None:
        while running:
            running.pop()[1].stop()
            gc.collect()
            cleanup_dist_env_and_memory()

    def start(
        trim: dict[str, Any] | None = None, model: Path | None = None, anew: bool = False, **options: Any
    ) -> Engine:
        asked = trim or {}, model or mini.path(), options
        if anew or not running or running[0][0] != asked:
            stop()
            gc.freeze()  # what is there already stays, and need not be looked at whenever an engine goes
            running.append((asked, Engine(asked[1], asked[0], **options)))
        engine = running[0][1]
        engine.forget()
        return engine

    yield start
    stop()


def request(processor: Any, question: str, images: Sequence[str], tokens: int, options: Any = None) -> Request:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Request(ids, tuple(images), tokens, options)


def rows_of(layout: str) -> list[dict[str, Any]]:
    return [row for row in mini.heldout() if row["layout"] == layout]


def mixed(processor: Any, count: int = 3, tokens: int = 12) -> list[Request]:
    requests = []
    layouts = {layout: rows_of(layout) for layout in ("2x2", "1x1", "1x2")}
    for place in range(count):
        for rows in layouts.values():
            row = rows[7 * place]
            requests.append(request(processor, row["question"], [row["image"]], tokens))
        requests.append(request(processor, row["question"], [], tokens))
    pictures = [layouts[layout][3]["image"] for layout in ("1x1", "2x2")]
    return [*requests, request(processor, layouts["2x2"][3]["question"], pictures, tokens)]


def reference(model: Any, processor: Any, requests: Sequence[Request], **options: Any) -> list[list[int]]:
    """What crosstrim on transformers generates, one request at a time, whatever the end-of-text token says."""
    model.generation_config.eos_token_id = None
    answers = []
    with crosstrim.trim(model, **options), torch.no_grad():
        for one in requests:
            text = processor.tokenizer.decode(one.ids)
            images = [Image.open(path).convert("RGB") for path in one.images]
            inputs = processor(images=images or None, text=text, add_special_tokens=False, return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == one.ids
            output = model.generate(
                **inputs,
                max_new_tokens=one.tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best, second = torch.cat(output.logits).topk(2).values.unbind(-1)
            assert (best - second).min() > TIE, f"two tokens are equally good: ask something else than {text!r}"
            answers.append(output.sequences[0, len(one.ids) :].tolist())
    return answers
