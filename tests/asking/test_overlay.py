"""Where features lie in the picture, checked against the pixels that the real processor hands to the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crosstrim.asking import overlay as viz
from crosstrim.errors import InputError, UnwritableError
from crosstrim.models.tiles import Tiling
from crosstrim.trimming.report import ImageReport
from tests.support import tiny
from tests.support.tiny_checkpoint import processor

TILE, PATCH, PER_TILE = tiny.TILE_PIXELS, tiny.PATCH_PIXELS, tiny.FEATURES_PER_TILE
PER_SIDE = TILE // PATCH
LAYOUTS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
# Width and height: exact canvases, larger and smaller pictures, odd sizes with padding at the right or below.
ODD_SIZES = [
    (100, 3),
    (3, 100),
    (100, 1),
    (1, 100),
    (3, 3),
    (1, 3),
    (97, 61),
    (61, 97),
    (500, 111),
    (111, 500),
    (23, 9),
    (9, 23),
    (5, 5),
    (1, 1),
    (701, 700),
    (300, 2),
    (29, 28),
]
SIZES = [(columns * TILE, rows * TILE) for rows, columns in LAYOUTS] + ODD_SIZES


def tiling_of(size: tuple[int, int]) -> Tiling:
    return Tiling.of(size, processor().image_processor, PATCH)


def seen_by_the_model(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Told by the processor's own output: [tiles, tile, tile, 2], where in the picture (as a share of width and
    height) every pixel of every real tile comes from, and [tiles, tile, tile], whether it is of the picture."""
    width, height = size
    across = np.round(np.linspace(0, 255, 2 * width + 1)[1::2])
    down = np.round(np.linspace(0, 255, 2 * height + 1)[1::2])
    red, green = np.broadcast_to(across, (height, width)), np.broadcast_to(down[:, None], (height, width))
    gradient = np.stack([red, green, np.full((height, width), 255)], axis=-1).astype(np.uint8)
    image_processor = processor().image_processor
    image_processor.do_normalize = False
    out = image_processor(Image.fromarray(gradient), return_tensors="np")
    tiles = out["pixel_values"][0, 0][: int(out["aspect_ratio_mask"].sum())]
    return tiles[:, :2].transpose(0, 2, 3, 1), tiles[:, 2] > 0.5


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_feature_lies_where_its_pixels_come_from(size):
    tiling = tiling_of(size)
    origin, inside = seen_by_the_model(size)
    assert tiling.feature_count == len(origin) * PER_TILE
    # A pixel of the resized picture; half a one of an enlarged picture, whose edges have none to mix with; 8 bits.
    sides = ((tiling.resized_width, size[0]), (tiling.resized_height, size[1]))
    tolerance = [1 / resized + 2 / 255 + (0.5 / side if resized > side else 0) for resized, side in sides]
    for feature in range(tiling.feature_count):
        tile, place = divmod(feature, PER_TILE)
        box = tiling.box(feature)
        if place == 0:
            assert tiling.is_class_token(feature)
            assert box is None
            continue
        row, column = divmod(place - 1, PER_SIDE)
        patch = np.s_[tile, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        real = inside[patch]
        if not real.any():
            assert box is None, f"feature {feature} lies in the padding"
            continue
        middle = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
        assert (np.abs(origin[patch][real].mean(axis=0) - middle) <= tolerance).all()
        # Its extent is that of the real pixels, which are whole columns and rows.
        assert (box[2] - box[0]) * tiling.resized_width / size[0] == pytest.approx(real.any(axis=0).sum())
        assert (box[3] - box[1]) * tiling.resized_height / size[1] == pytest.approx(real.any(axis=1).sum())


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_boxes_cover_the_picture_once_and_nothing_beyond_it(size):
    tiling = tiling_of(size)
    boxes = [box for box in map(tiling.box, range(tiling.feature_count)) if box]
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in boxes) == pytest.approx(
        size[0] * size[1]
    )
    assert min(min(box) for box in boxes) == 0
    assert max(box[2] for box in boxes) == pytest.approx(size[0])
    assert max(box[3] for box in boxes) == pytest.approx(size[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_change_inside_a_box_changes_that_feature_alone(layout):
    """The model's own order: which patch embedding a change in the picture reaches."""
    rows, columns = layout
    model, prepare = tiny.build(), processor().image_processor
    entered: list[torch.Tensor] = []
    embedding = model.model.vision_model.gated_positional_embedding
    embedding.register_forward_pre_hook(lambda module, args: entered.append(args[0][0].flatten(0, 1)))

    def features(picture: np.ndarray) -> torch.Tensor:
        inputs = prepare(Image.fromarray(picture), return_tensors="pt")
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        with torch.no_grad():
            model.model.vision_model(**{name: inputs[name] for name in names})
        return entered.pop()

    blank = np.zeros((rows * TILE, columns * TILE, 3), dtype=np.uint8)
    tiling = tiling_of((columns * TILE, rows * TILE))
    assert (tiling.rows, tiling.columns) == layout
    before = features(blank)
    for feature in range(1, tiling.feature_count, 5):
        if tiling.is_class_token(feature):
            continue
        left, top, right, bottom = map(round, tiling.box(feature))
        changed = blank.copy()
        changed[top:bottom, left:right] = 255
        moved = (features(changed) != before).any(-1).nonzero().flatten().tolist()
        assert moved == [feature]


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_kept_patches_are_as_they_were_and_dropped_ones_are_grey():
    picture = noise((112, 56))
    tiling = tiling_of((112, 56))
    assert (tiling.rows, tiling.columns, tiling.resized_width) == (1, 2, 56)
    feature = PER_TILE + 1 + PER_SIDE + 2  # second tile, second row, third column; a patch is 14 pixels wide here
    painted = np.asarray(viz.overlay(picture, [0, feature], tiling, legend=False)).astype(float)
    original = np.asarray(picture).astype(float)
    left, top = 56 + 2 * 14, 14
    inner = np.s_[top + 1 : top + 13, left + 1 : left + 13]
    assert np.array_equal(painted[inner], original[inner])
    edge = np.ones((14, 14), dtype=bool)
    edge[1:-1, 1:-1] = False
    assert (painted[top : top + 14, left : left + 14][edge] == viz.OUTLINE).all()
    elsewhere = np.ones((56, 112), dtype=bool)
    elsewhere[top : top + 14, left : left + 14] = False
    grey = original @ [0.299, 0.587, 0.114] * 0.3 + 75
    assert np.abs(painted[elsewhere] - grey[elsewhere][:, None]).max() <= 1


def test_everything_kept_leaves_the_picture_as_it_was():
    picture = noise((97, 61))
    tiling = tiling_of(picture.size)
    painted = viz.overlay(picture, range(tiling.feature_count), tiling, legend=False)
    assert np.array_equal(np.asarray(painted), np.asarray(picture))


def test_a_small_picture_is_painted_at_the_size_the_model_sees():
    tiling = tiling_of((5, 5))
    assert viz.overlay(noise((5, 5)), [1], tiling, legend=False).size == (TILE, TILE)


def test_a_thin_picture_is_stretched_until_it_can_be_seen():
    tiling = tiling_of((8000, 1))
    picture = Image.new("RGB", (8000, 1), "red")
    painted = np.asarray(viz.overlay(picture, [1], tiling, legend=False))
    assert painted.shape == (24, 8000, 3)
    right = round(tiling.box(1)[2])
    assert (painted[:, : right - 1] == (255, 0, 0)).all()
    assert (painted[:, right - 1] == viz.OUTLINE).all()
    assert (painted[:, right:] == painted[0, -1]).all()
    with pytest.raises(
        InputError, match=r"drawn 24 pixels thick it has 24000000, and the limit is 16000000\. Cut it"
    ):
        viz.overlay(Image.new("1", (1, 1_000_000)), [1], tiling_of((1, 1_000_000)))


@pytest.mark.parametrize("size", [(5, 5), (97, 61), (1, 300), (8000, 1), (600, 500)])
def test_the_legend_hides_nothing_and_is_always_there(size):
    picture, tiling = noise(size), tiling_of(size)
    plain = np.asarray(viz.overlay(picture, [0, 1, 2], tiling, legend=False))
    painted = np.asarray(viz.overlay(picture, [0, 1, 2], tiling))
    height, width = plain.shape[:2]
    assert np.array_equal(painted[:height, :width], plain)
    rows, columns = np.nonzero((painted[height:] > 200).all(-1))
    assert len(rows) > 100
    assert 0 < rows.min() <= rows.max() < len(painted) - height - 1
    assert 0 < columns.min() <= columns.max() < painted.shape[1] - 1


def test_neighbours_are_outlined_together():
    picture = noise((112, 112))
    tiling = tiling_of((112, 112))
    painted = np.asarray(viz.overlay(picture, [1, 2, 1 + PER_SIDE], tiling, legend=False))
    outlined = (painted == viz.OUTLINE).all(-1)
    side = round(tiling.box(1)[2])
    assert not outlined[: side - 1, : side - 1].any()
    assert outlined[side - 1, side : 2 * side].all()
    assert outlined[:side, 2 * side - 1].all()
    assert outlined[side : 2 * side, side - 1].all()
    assert outlined[2 * side - 1, :side].all()


MEASURED = """
import re
from PIL import Image
from crosstrim.asking import overlay
from crosstrim.models.tiles import Tiling

picture = Image.new("RGB", (9100, 7000), "red")
tiling = Tiling(9100, 7000, 1120, 862, 2, 2, 560, 14)


def memory(what):  # in KiB; of this process alone, where getrusage begins with the peak of the one that started it
    with open("/proc/self/status") as file:
        return int(re.search(what + r":\\s+(\\d+)", file.read())[1])


before = memory("VmRSS")
painted = overlay.overlay(picture, range(0, tiling.feature_count, 3), tiling)
assert painted.width == 9100
print((memory("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process as Linux tells it")
def test_the_largest_picture_takes_little_more_than_its_copy():
    run = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300 << 20


def test_a_report_of_a_later_image_counts_from_its_own_first_feature():
    picture = noise((56, 56))
    tiling = tiling_of(picture.size)
    size = tiny.FEATURES_PER_IMAGE
    second = ImageReport(features=size, visible=size, kept=2, kept_indices=(size + 3, size + 9), layers=(2, 2))
    assert np.array_equal(
        np.asarray(viz.overlay(picture, second, tiling)), np.asarray(viz.overlay(picture, [3, 9], tiling))
    )


def test_the_legend_counts_what_has_no_place():
    tiling = tiling_of((97, 61))
    text = viz.legend_text([0, 1, PER_TILE], tiling)
    assert text == "kept 1 of 40 patches, 2 of 4 class tokens, 0 of 24 padding patches"
    assert viz.legend_text([], tiling_of((28, 28))) == "kept 0 of 16 patches, 0 of 1 class token"


def test_what_does_not_fit_together_is_refused():
    tiling = tiling_of((56, 56))
    with pytest.raises(InputError, match="the picture has 5 x 5 pixels and the layout is of one with 56 x 56"):
        viz.overlay(noise((5, 5)), [], tiling)
    with pytest.raises(InputError, match="feature 68 is not one of the 68 of this picture's 2 x 2 tiles"):
        viz.overlay(noise((56, 56)), [68], tiling)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "out.png"
    viz.save(noise((8, 8)), target)
    written = target.read_bytes()

    def half_written(self, path, *_args):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(UnwritableError, match="cannot be written: No space left on device"):
        viz.save(noise((9, 9)), target)
    assert target.read_bytes() == written
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.xyz", "ends in '.xyz'; a picture can be written to"),
        ("no/out.png", "lies in a folder that does not exist"),
    ],
)
def test_where_no_picture_can_go_is_told_beforehand(tmp_path, name, words):
    with pytest.raises(InputError, match=words):
        viz.check_path(tmp_path / name)
