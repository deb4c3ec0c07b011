"""The sizes of a vision-language model that trimming depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """How image features are counted, and how many heads look at them.

    Features stand in (image, tile, feature) order. Every image is padded to the same number of tiles.

    Attributes:
        features_per_tile: patches of a tile plus its class token (1601 on 11B and 90B).
        tiles_per_image: tiles every image is padded to (4 on 11B and 90B).
        query_heads: of a cross-attention layer, over all processes that share them (32 and 64).
        key_value_heads: likewise (8).
        head_size: numbers of a query, key or value in one head (128).
    """

    features_per_tile: int
    tiles_per_image: int
    query_heads: int
    key_value_heads: int
    head_size: int

    @property
    def features_per_image(self) -> int:
        """Image features of one image, padding tiles included (6404 on 11B and 90B)."""
        return self.features_per_tile * self.tiles_per_image
