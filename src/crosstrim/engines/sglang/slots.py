"""Give back the KV slots that turn out unneeded, once a prompt was computed. A plugin of SGLang.

How much stays under `k` is known only after the first cross-attention layer has scored. Until then a request holds as
many image slots as could be needed; afterwards its row of the request table is closed up and its lengths are lowered,
so that to SGLang it looks as if it had never held more.
"""

from __future__ import annotations

import os
from array import array
from typing import Any

import torch

from crosstrim.engines.sglang.launch import PACKAGE
from crosstrim.errors import EngineError

_RESULT = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_AFTER_PROMPTS = f"{_RESULT}.process_batch_result_prefill"
_AFTER_LOADING = "sglang.srt.managers.scheduler.Scheduler.init_model_worker"


def register() -> None:
    """Register the hooks; SGLang's plugin framework calls this in every process. Does nothing for other models."""
    if os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE") != PACKAGE:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_AFTER_PROMPTS, after_prompts, HookType.AFTER)
    HookRegistry.register(_AFTER_LOADING, after_loading, HookType.AFTER)


def check_hooked() -> None:
    """Refuse to go on where SGLang did not call `after_prompts` in.

    Raises:
        EngineError: the plugin is not in force.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    if _AFTER_PROMPTS not in HookRegistry._patched:
        raise EngineError(
            "SGLang did not load crosstrim's plugin, without which unneeded KV slots are never given back; install "
            "crosstrim with pip in SGLang's environment and let SGLANG_PLUGINS, if set, name crosstrim."
        )


def after_loading(outcome: Any, scheduler: Any) -> None:
    """Hook after SGLang has loaded the model: it takes its own, with a mere warning, where ours cannot be imported.

    Args:
        outcome: of the hooked method, None.
        scheduler: the `Scheduler`.

    Raises:
        EngineError: the model is not crosstrim's.
    """
    model = type(scheduler.tp_worker.model_runner.model)
    if not model.__module__.startswith(PACKAGE):
        raise EngineError(
            f"SGLang runs {model.__module__}.{model.__name__}, although SGLANG_EXTERNAL_MODEL_PACKAGE={PACKAGE} asks "
            "for crosstrim's Mllama; look for 'Ignore import error' in its log, and serve a Llama-3.2-Vision model."
        )


def after_prompts(outcome: Any, processor: Any, batch: Any, result: Any) -> None:
    """Hook after SGLang has processed the result of a batch of prompts.

    Args:
        outcome: of the hooked method, None.
        processor: the `SchedulerBatchResultProcessor`.
        batch: the `ScheduleBatch` just computed.
        result: of the batch.
    """
    table = processor.req_to_token_pool.req_to_token
    for place, request in enumerate(batch.reqs):
        retained = getattr(request.multimodal_inputs, "crosstrim_retained", None)
        if retained is None or not retained.free_slots or not request.kv.holds_kv:  # text alone, or finished already
            continue
        held, kept = request.multimodal_inputs.num_image_tokens, len(retained.indices)
        surplus = held - kept
        if surplus == 0:
            continue
        processor.token_to_kv_pool_allocator.free(close_up(table, request.kv, kept, held))
        _shorten(request, surplus)
        batch.encoder_lens_cpu[place] = kept
    batch.encoder_lens = torch.tensor(batch.encoder_lens_cpu).to(batch.encoder_lens)


def close_up(table: torch.Tensor, kv: Any, kept: int, held: int) -> torch.Tensor:
    """Take slots out of a request's row; what follows them moves up.

    Args:
        table: [requests, length] slots; changed in place.
        kv: the request's `ReqKvInfo`; its lengths are lowered.
        kept: image slots that stay, the first ones.
        held: image slots so far.

    Returns:
        The slots taken out.
    """
    row, end, surplus = table[kv.req_pool_idx], kv.kv_allocated_len, held - kept
    unneeded = row[kept:held].clone()
    row[kept : end - surplus] = row[held:end].clone()
    kv.kv_allocated_len -= surplus
    kv.kv_committed_len -= surplus
    return unneeded


def _shorten(request: Any, surplus: int) -> None:
    """Make the request's length what it would be, had it come with fewer image slots."""
    request.multimodal_inputs.num_image_tokens -= surplus
    request.origin_input_ids = request.origin_input_ids[surplus:]
    request.full_untruncated_fill_ids = array("q")  # SGLang builds it anew from the ids
    request.logprob_start_len = max(request.logprob_start_len - surplus, min(request.logprob_start_len, 0))
