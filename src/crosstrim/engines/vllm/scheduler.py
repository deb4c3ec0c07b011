"""vLLM's schedulers, which give images to the model in the order in which it meets their requests."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import CrossAttentionSpec

from crosstrim.engines.vllm import launch


class _Sync(Scheduler):
    def schedule(self, *args: Any, **options: Any) -> Any:
        """One step. The worker's batch has new requests first and resumed ones then, and so must its images be.

        vLLM's own order is that of admission, which differs where a resumed request was admitted before a new one:
        each would then read the other's image.
        """
        output = super().schedule(*args, **options)
        images = output.scheduled_encoder_inputs
        batch = [*(new.req_id for new in output.scheduled_new_reqs), *output.scheduled_cached_reqs.req_ids]
        output.scheduled_encoder_inputs = {name: images[name] for name in batch if name in images}
        return output

    def _try_schedule_encoder_inputs(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int, budget: int, **options: Any
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        if num_computed_tokens == 0 and self._blocks(request) >= self.kv_cache_config.num_blocks:  # one holds nothing
            self.encoder_cache_mismatch_reqs.add(request.request_id)  # by which vLLM ends a request with an error
            return [], 0, budget, [], []
        inputs, tokens, left, *others = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, budget, **options
        )
        # However little stays of an image, all of it is encoded: no more in a step than memory was measured for.
        return inputs, tokens, min(left, budget - len(inputs) * self._largest), *others

    @cached_property
    def _largest(self) -> int:
        model = self.vllm_config.model_config
        return launch.trim_of(model.hf_config).largest(launch.images_planned(model.multimodal_config))

    def _blocks(self, request: Any) -> int:
        """What a request with images fills at its end. If there are not so many, it would wait for ever."""
        slots = sum(request.get_num_encoder_embeds(place) for place in range(request.num_encoder_inputs))
        tokens = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        held = [slots if isinstance(spec, CrossAttentionSpec) else tokens for spec in specs]
        return sum(cdiv(count, spec.block_size) for count, spec in zip(held, specs, strict=True))


class _Async(_Sync, AsyncScheduler):
    """For steps that overlap."""


def scheduler(*, vllm_config: Any, **options: Any) -> Scheduler:
    """The scheduler that fits how vLLM was started; takes what vLLM gives its own."""
    kind = _Async if vllm_config.scheduler_config.async_scheduling else _Sync
    return kind(vllm_config=vllm_config, **options)
