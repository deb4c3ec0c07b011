"""Where the heat of one feature lies in the picture, against the layout that tests of the overlay check."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from crosstrim.asking.heat import heat
from crosstrim.errors import InputError
from crosstrim.models.tiles import Tiling
from tests.support.tiny import FEATURES_PER_TILE as PER_TILE
from tests.support.tiny import PATCH_PIXELS
from tests.support.tiny_checkpoint import processor

SIZES = [(28, 28), (56, 28), (56, 56), (28, 84), (97, 61), (61, 97), (111, 500)]


def tiling_of(size: tuple[int, int]) -> Tiling:
    return Tiling.of(size, processor().image_processor, PATCH_PIXELS)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("times", [1, 3])
def test_a_patch_is_warm_where_it_lies(size, times):
    tiling = tiling_of(size)
    placed = [feature for feature in range(tiling.feature_count) if tiling.box(feature)]
    picture = Image.new("RGB", (size[0] * times, size[1] * times))
    for feature in (placed[0], placed[len(placed) // 2], placed[-1]):
        saliency = torch.zeros(tiling.feature_count + PER_TILE)  # a padding tile follows
        saliency[feature] = 0.1
        saliency[0] = 5  # a class token has no place
        painted = np.asarray(heat(picture, saliency, tiling)).astype(int).sum(-1)
        assert painted.shape == picture.size[::-1]
        left, top, right, bottom = (edge * times for edge in tiling.box(feature))
        rows, columns = np.nonzero(painted == painted.max())
        assert left <= columns.mean() + 0.5 <= right
        assert top <= rows.mean() + 0.5 <= bottom
        assert painted.max() > 2 * np.median(painted)


def test_no_attention_at_all_is_cold():
    painted = np.asarray(heat(Image.new("RGB", (28, 28)), torch.zeros(PER_TILE), tiling_of((28, 28))))
    assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 1


def test_saliency_of_another_picture_is_refused():
    for shape in ((PER_TILE,), (1, 4 * PER_TILE)):
        with pytest.raises(InputError, match="must have one dimension and hold the"):
            heat(Image.new("RGB", (56, 28)), torch.zeros(shape), tiling_of((56, 28)))
