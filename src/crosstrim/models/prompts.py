"""A prompt's tensors without its pictures' pixels: what the processor makes of the text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from crosstrim.models import vision


def image_inputs(processor: Any, pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What the processor makes of the pictures of one sample.

    Args:
        processor: of the model.
        pictures: in the order of their tokens in the text.

    Returns:
        pixel_values [1, images, tiles, 3, side, side] float32, aspect_ratio_ids [1, images] and aspect_ratio_mask
        [1, images, tiles] int64.
    """
    made = processor.image_processor(images=[list(pictures)], return_tensors="pt")
    return {name: made[name] for name in vision.INPUTS}


def text_inputs(processor: Any, prompt: str, aspect_ratio_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the processor makes of one prompt whose pictures were made into tensors before.

    The processor itself would work on the pictures again.

    Args:
        processor: of the model.
        prompt: the text, with an image token for every picture.
        aspect_ratio_mask: [1, images, tiles], of `image_inputs`.

    Returns:
        input_ids [1, T], attention_mask [1, T] and cross_attention_mask [1, T, images, tiles], int64.
    """
    from transformers.models.mllama.processing_mllama import (
        build_string_from_input,
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    text = build_string_from_input(prompt, processor.bos_token, processor.image_token)
    made = processor.tokenizer([text], add_special_tokens=False)
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(made["input_ids"][0], processor.image_token_id)],
        num_tiles=aspect_ratio_mask.sum(-1).tolist(),
        max_num_tiles=aspect_ratio_mask.shape[-1],
        length=len(made["input_ids"][0]),
    )
    return {
        "input_ids": torch.tensor(made["input_ids"], device="cpu"),
        "attention_mask": torch.tensor(made["attention_mask"], device="cpu"),
        "cross_attention_mask": torch.from_numpy(mask),
    }
