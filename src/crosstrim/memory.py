"""Bytes of a model's weights and KV cache, from its shape alone: arithmetic, nothing measured.

Cross-attention layers cache image features and no text; self-attention layers cache text and no image.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosstrim.method.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class ModelShape(Geometry):
    """The numbers of a model on which its memory depends; self-attention has the heads of cross-attention.

    Attributes:
        name: of the model.
        text_layers: decoder layers, cross-attention layers included.
        cross_layers: how many of them are cross-attention layers.
        hidden_size: of the decoder.
        parameters: of the whole model, vision tower included.
        bytes_per_element: of weights and KV cache alike; 2 is bfloat16.
    """

    name: str
    text_layers: int
    cross_layers: int
    hidden_size: int
    parameters: int
    bytes_per_element: int = 2

    @property
    def self_layers(self) -> int:
        """Layers whose cache grows with the text."""
        return self.text_layers - self.cross_layers

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.bytes_per_element

    @property
    def kv_bytes_per_layer(self) -> int:
        """Bytes of the key and the value of one feature, or of one text token, in one layer."""
        return 2 * self.key_value_heads * self.head_size * self.bytes_per_element


def image_kv_bytes(shape: ModelShape, features: int | None = None) -> int:
    """Bytes that image features take in the caches of all cross-attention layers together.

    Args:
        shape: of the model.
        features: how many are kept; None: all of one image, padding included, as the untrimmed model caches them.
    """
    count = shape.features_per_image if features is None else features
    return count * shape.cross_layers * shape.kv_bytes_per_layer


def text_kv_bytes(shape: ModelShape, tokens: int = 1) -> int:
    """Bytes that text tokens take in the caches of all self-attention layers together."""
    return tokens * shape.self_layers * shape.kv_bytes_per_layer


WEIGHT_BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8.0, "fp8": 8.0}
"""Bits of a weight in each format that quantises weights, scales included: nf4 has one of eight bits for 64 weights,
and for 256 of these one of 32. Those of the others, one a row, are too small to count."""

LLAMA_11B = ModelShape(
    name="Llama-3.2-11B-Vision-Instruct",
    text_layers=40,
    cross_layers=8,
    hidden_size=4096,
    query_heads=32,
    key_value_heads=8,
    head_size=128,
    features_per_tile=1601,
    tiles_per_image=4,
    parameters=10_670_220_835,
)
"""From the published `config.json`; the parameters are counted on a model made of it without values."""

LLAMA_90B = ModelShape(
    name="Llama-3.2-90B-Vision-Instruct",
    text_layers=100,
    cross_layers=20,
    hidden_size=8192,
    query_heads=64,
    key_value_heads=8,
    head_size=128,
    features_per_tile=1601,
    tiles_per_image=4,
    parameters=88_593_355_323,
)
"""From the published configuration, as `LLAMA_11B`."""

SHAPES = {"11b": LLAMA_11B, "90b": LLAMA_90B}
"""Shapes known without weights, by the names that people type."""
