"""How many pictures can be in flight on given cards, from a model's shape alone: arithmetic, nothing measured."""

from __future__ import annotations

from crosstrim.memory import WEIGHT_BITS, ModelShape, image_kv_bytes, text_kv_bytes

RESERVE = 0.1
"""Share of a card left for everything but weights and KV cache: activations, fragmentation, the runtime. A guess."""

VISION_PARAMETERS = {"11b": 895_028_755, "90b": 926_490_131}
"""Of the models in `crosstrim.memory.SHAPES`: vision tower and projection of its features, which every card holds."""


MATRIX_PARAMETERS = {"11b": 8_698_986_496, "90b": 85_479_915_520}
"""Of the same models: matrices of linear layers that `crosstrim.load(quantization=...)` makes smaller."""


def weight_bytes(shape: ModelShape, matrix_parameters: int, quantization: str | None = None) -> float:
    """Bytes of all weights.

    Args:
        shape: of the model.
        matrix_parameters: how many of its parameters quantising makes smaller.
        quantization: the format, of `crosstrim.memory.WEIGHT_BITS`; None: they are as the others.
    """
    bits = 8 * shape.bytes_per_element if quantization is None else WEIGHT_BITS[quantization]
    return (shape.parameters - matrix_parameters) * shape.bytes_per_element + matrix_parameters * bits / 8


def weight_bytes_per_card(shape: ModelShape, vision_parameters: int, cards: int) -> float:
    """Bytes of weights on each of the cards that share a model.

    Args:
        shape: of the model.
        vision_parameters: how many of its parameters every card holds.
        cards: that the rest is divided over (norms and gates, which are copied too, are too small to count).
    """
    divided = shape.parameters - vision_parameters
    return (vision_parameters + divided / cards) * shape.bytes_per_element


def request_kv_bytes(
    shape: ModelShape, features: int, text_tokens: int, one_row: bool = False, block: int = 1
) -> int:
    """Bytes of KV cache of a request, on all cards together.

    Args:
        shape: of the model.
        features: image features that its cache keeps, of all its images.
        text_tokens: of its prompt and answer.
        one_row: whether image features and text share one row of slots that exists in every layer, as in SGLang;
            in transformers and vLLM, image features are in the cross-attention layers alone and text in the others.
        block: slots that are only given together; 16 in vLLM.
    """
    features, text_tokens = (-(-count // block) * block for count in (features, text_tokens))
    if one_row:
        return (features + text_tokens) * shape.text_layers * shape.kv_bytes_per_layer
    return image_kv_bytes(shape, features) + text_kv_bytes(shape, text_tokens)


def requests_in_flight(
    shape: ModelShape,
    weight_bytes: float,
    card_bytes: float,
    cards: int,
    features: int,
    text_tokens: int,
    one_row: bool = False,
    block: int = 1,
) -> int | None:
    """How many requests' KV caches fit beside the weights.

    Args:
        shape: of the model.
        weight_bytes: of the weights on each card.
        card_bytes: memory of a card.
        cards: that share the model by tensor parallelism, weights and KV heads alike.
        features: as for `request_kv_bytes`.
        text_tokens: likewise.
        one_row: likewise.
        block: likewise.

    Returns:
        The number, or None when the weights alone do not fit.
    """
    free = card_bytes * (1 - RESERVE) - weight_bytes
    if free < 0:
        return None
    return int(free * cards // request_kv_bytes(shape, features, text_tokens, one_row, block))
