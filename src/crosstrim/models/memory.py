"""How much memory a question takes, computed from the model's configuration."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from crosstrim.memory import image_kv_bytes, text_kv_bytes
from crosstrim.models import mllama

_VISION_PADDING = 8  # the vision tower pads a tile's features to a multiple of this


def bytes_per_sample(model: nn.Module, text_tokens: int) -> int:
    """Bytes that one picture and its question take at the prompt, beyond the weights. An estimate from above, ours.

    It is the sum of the keys and values of all image features in every cross-attention layer (nothing is trimmed
    yet), those of the text in every self-attention layer, the vision tower's widest layer, output and projection,
    and its attention mask.

    Args:
        model: a loaded Mllama.
        text_tokens: of prompt and answer together.
    """
    config = cast(Any, mllama.locate(model).model).config
    shape, vision = mllama.shape_of(config, type(model).__name__), config.vision_config
    padded = -(-shape.features_per_tile // _VISION_PADDING) * _VISION_PADDING * shape.tiles_per_image
    widths = vision.intermediate_size + vision.vision_output_dim + shape.hidden_size
    tower = int(padded * widths + padded**2) * shape.bytes_per_element
    return image_kv_bytes(shape) + text_kv_bytes(shape, text_tokens) + tower
