"""Hand pictures to the model in the order in which it meets their requests."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class _InBatchOrder:
    def schedule(self, *args: Any, **options: Any) -> Any:
        output = super().schedule(*args, **options)
        inputs = output.scheduled_encoder_inputs
        order = [*(new.req_id for new in output.scheduled_new_reqs), *output.scheduled_cached_reqs.req_ids]
        output.scheduled_encoder_inputs = {name: inputs[name] for name in order if name in inputs}
        return output


class _Sync(_InBatchOrder, Scheduler):
    pass


class _Async(_InBatchOrder, AsyncScheduler):
    pass


def scheduler(vllm_config: Any, *args: Any, **options: Any) -> Any:
    """vLLM's scheduler."""
    chosen = _Async if vllm_config.scheduler_config.async_scheduling else _Sync
    return chosen(vllm_config, *args, **options)
