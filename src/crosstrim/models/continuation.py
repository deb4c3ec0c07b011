"""What a model would say next, token by token of given continuations, on the cache of their prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from crosstrim.models.names import cache_keyword


@torch.no_grad()
def logits(
    model: Any, inputs: Mapping[str, torch.Tensor], continuation: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """The logits that predict every token of a continuation.

    The prompt is read first, as `generate` reads it, and the continuation on its cache. On a trimmed model the
    prompt alone therefore decides which features stay, and the continuation reads what a generated token would.

    Args:
        model: a loaded Mllama, trimmed or not.
        inputs: of the processor for B prompts, padded on the left.
        continuation: [B, C] int, token ids, padded on the right, C >= 1.
        real: [B, C] int, 1 where `continuation` holds a token and 0 where it is padding.

    Returns:
        [B, C, V] float32; what stands at padding means nothing.
    """
    from transformers import DynamicCache

    held = {cache_keyword(): DynamicCache(config=model.config.get_text_config())}
    mask = torch.cat([inputs["attention_mask"], real], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    length = inputs["input_ids"].shape[1]
    prompt = {**inputs, "position_ids": positions[:, :length]}
    last = model(**prompt, use_cache=True, **held, logits_to_keep=1).logits
    rest: dict[str, torch.Tensor] = {"attention_mask": mask, "position_ids": positions[:, length:]}
    if "cross_attention_mask" in inputs:  # what follows a prompt sees what its last row sees
        seen = inputs["cross_attention_mask"]
        # Of all rows: every version finds the present ones in it, and 5.17 in nothing shorter.
        rest["cross_attention_mask"] = torch.cat(
            [seen, seen[:, -1:].expand(-1, continuation.shape[1], -1, -1)], dim=1
        )
    after = model(input_ids=continuation, **rest, use_cache=True, **held).logits
    return torch.cat([last, after[:, :-1]], dim=1).float()
