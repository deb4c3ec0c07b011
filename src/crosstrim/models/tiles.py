"""Where Mllama's image processor puts a picture's pixels, and so which part of the picture a feature is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge, in pixels of the picture."""


@dataclass(frozen=True)
class Tiling:
    """How one picture is laid out: resized in proportion, put top left on a canvas of tiles, cut into patches.

    Attributes:
        width: of the picture, in pixels.
        height: of the picture.
        resized_width: of the picture on the canvas; the canvas beyond it is padding.
        resized_height: likewise.
        rows: of tiles.
        columns: of tiles.
        tile_pixels: side of a tile.
        patch_pixels: side of a patch.
    """

    width: int
    height: int
    resized_width: int
    resized_height: int
    rows: int
    columns: int
    tile_pixels: int
    patch_pixels: int

    @classmethod
    def of(cls, size: tuple[int, int], image_processor: Any, patch_pixels: int) -> Tiling:
        """The layout that `image_processor` gives a picture.

        Args:
            size: width and height of the picture.
            image_processor: of the model.
            patch_pixels: side of a patch, `config.vision_config.patch_size`.
        """
        from transformers.models.mllama.image_processing_pil_mllama import (
            get_image_size_fit_to_canvas,
            get_optimal_tiled_canvas,
        )

        width, height = size
        tile = int(image_processor.size["height"])
        canvas = get_optimal_tiled_canvas(height, width, int(image_processor.max_image_tiles), tile)
        canvas_height, canvas_width = map(int, canvas)
        resized_height, resized_width = get_image_size_fit_to_canvas(height, width, canvas_height, canvas_width, tile)
        return cls(
            width=width,
            height=height,
            resized_width=int(resized_width),
            resized_height=int(resized_height),
            rows=canvas_height // tile,
            columns=canvas_width // tile,
            tile_pixels=tile,
            patch_pixels=patch_pixels,
        )

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of a tile; a rest narrower than a patch is not seen by the model."""
        return self.tile_pixels // self.patch_pixels

    @property
    def features_per_tile(self) -> int:
        """The class token and the patches of a tile."""
        return self.patches_per_side**2 + 1

    @property
    def feature_count(self) -> int:
        """Features of all real tiles; the model's padding tiles come after them."""
        return self.features_per_tile * self.rows * self.columns

    def is_class_token(self, feature: int) -> bool:
        """Whether this feature stands for a whole tile, and has no place in the picture."""
        return feature % self.features_per_tile == 0

    def box(self, feature: int) -> Box | None:
        """The part of the picture that a feature is of.

        Args:
            feature: its index in (tile, feature) order, counted from the first feature of the image.

        Returns:
            Its edges in pixels of the picture; None for a class token, and for a patch that lies in the padding.
        """
        tile, place = divmod(feature, self.features_per_tile)
        if place == 0 or tile >= self.rows * self.columns:
            return None
        tile_row, tile_column = divmod(tile, self.columns)
        row, column = divmod(place - 1, self.patches_per_side)
        left = tile_column * self.tile_pixels + column * self.patch_pixels
        top = tile_row * self.tile_pixels + row * self.patch_pixels
        if left >= self.resized_width or top >= self.resized_height:
            return None
        right = min(left + self.patch_pixels, self.resized_width)
        bottom = min(top + self.patch_pixels, self.resized_height)
        across, down = self.width / self.resized_width, self.height / self.resized_height
        return left * across, top * down, right * across, bottom * down
