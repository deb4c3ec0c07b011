"""How much memory a question takes, computed from the model's configuration."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

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
    located = mllama.locate(model)
    config = cast(Any, located.model).config
    text, vision = config.text_config, config.vision_config
    cross_layers = len(located.cross_layers)
    head_size = text.hidden_size // text.num_attention_heads
    values_per_token = 2 * text.num_key_value_heads * head_size  # of one layer, keys and values
    image_cache = located.features_per_image * cross_layers * values_per_token
    text_cache = text_tokens * (text.num_hidden_layers - cross_layers) * values_per_token
    padded = -(-located.features_per_tile // _VISION_PADDING) * _VISION_PADDING * located.tiles_per_image
    widths = vision.intermediate_size + vision.vision_output_dim + text.hidden_size
    size = next(parameter for parameter in model.parameters() if parameter.is_floating_point()).element_size()
    return int((image_cache + text_cache + padded * widths + padded**2) * size)
