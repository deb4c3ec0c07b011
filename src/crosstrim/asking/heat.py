"""Paint onto a picture how much attention the question pays to each of its patches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from crosstrim.errors import InputError

if TYPE_CHECKING:
    import torch

    from crosstrim.models.tiles import Tiling

# From no attention to the most: the share of it, and red, green and blue.
_SHARES = (0.0, 0.35, 0.7, 1.0)
_COLOURS = np.array([(10, 5, 40), (150, 30, 110), (245, 110, 40), (255, 245, 170)], dtype=np.float32)
_OPACITY = 0.7
_NONE = 1e-30  # divides where nothing drew any attention


def heat(picture: Image.Image, saliency: torch.Tensor, tiling: Tiling) -> Image.Image:
    """The picture under a map of attention, from dark over red to light.

    Attention is heavy-tailed: colours go by the square root of a patch's share of the largest. Class tokens have no
    place in the picture and are left out.

    Args:
        picture: as it was given to the processor, or a smaller copy of it.
        saliency: [N] float, attention that each feature of the picture drew, counted from its first feature; those
            past its real tiles are padding.
        tiling: how the processor laid the picture out, from `Tiling.of`.

    Returns:
        A new RGB picture of the size of the one given.

    Raises:
        InputError: `saliency` has fewer features than the picture's tiles.
    """
    if saliency.dim() != 1 or len(saliency) < tiling.feature_count:
        raise InputError(
            f"saliency of shape {tuple(saliency.shape)} must have one dimension and hold the {tiling.feature_count} "
            f"features of this picture's {tiling.rows} x {tiling.columns} tiles."
        )
    side = tiling.patches_per_side
    patches = saliency[: tiling.feature_count].float().cpu().view(tiling.rows, tiling.columns, -1)[..., 1:]
    canvas = patches.unflatten(-1, (side, side)).transpose(1, 2).flatten(2).flatten(0, 1).numpy()
    # What the picture covers of the canvas, in patches; the last ones may lie partly in the padding.
    across, down = (
        min(pixels / tiling.patch_pixels, patches)
        for pixels, patches in zip((tiling.resized_width, tiling.resized_height), canvas.shape[::-1], strict=True)
    )
    seen = canvas[: math.ceil(down), : math.ceil(across)]
    warmth = Image.fromarray(np.sqrt(seen / max(float(seen.max()), _NONE)))
    drawn = np.asarray(warmth.resize(picture.size, Image.Resampling.BILINEAR, box=(0, 0, across, down)))
    colours = np.stack([np.interp(drawn, _SHARES, _COLOURS[:, channel]) for channel in range(3)], -1)
    painted = Image.fromarray(colours.astype(np.uint8))
    return Image.blend(picture.convert("RGB"), painted, _OPACITY)
