"""What the later layers really attend to: the upper reference for policies, which know the first layer only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from crosstrim.eval import watch
from crosstrim.models import mllama


def votes(model: Any, inputs: Mapping[str, torch.Tensor], answers: torch.Tensor) -> torch.Tensor:
    """Score features by the attention that every later cross-attention layer pays them, prompt and answer together.

    It reads the untrimmed model's own answer, so it needs a second pass and cannot be had in practice.

    Args:
        model: a loaded Mllama, not trimmed.
        inputs: of the processor, padded on the left.
        answers: [B, S] the tokens that the model generated for them, end of text and padding included.

    Returns:
        [B, 1, N] float32: one voter, the mean over the layers after the first one and their query heads.
    """
    said = _said(model, answers)
    mask = inputs["cross_attention_mask"]
    inputs = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], answers], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], said.long()], dim=1),
        "cross_attention_mask": torch.cat([mask, mask[:, -1:].expand(-1, answers.shape[1], -1, -1)], dim=1),
    }
    located = mllama.locate(model)
    scores = watch.run(located, located.followers, inputs).scores
    return torch.stack([one.mean(1, keepdim=True) for one in scores]).mean(0)


def _said(model: Any, answers: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: the tokens before the end of text."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return torch.ones_like(answers, dtype=torch.bool)
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device))
    return ended.cumsum(1) == 0
