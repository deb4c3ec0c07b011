"""Paint what was kept onto the picture it was kept from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from crosstrim.errors import InputError
from crosstrim.models.tiles import Tiling
from crosstrim.trimming.report import ImageReport, TrimReport
from crosstrim.wording import counted

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
"""What `save` writes."""

OUTLINE = (255, 200, 0)
_DIMMED, _HAZE = 0.3, 75  # what is left of the contrast, and how bright black becomes
_GREY = (0.299, 0.587, 0.114)


def overlay(
    picture: Image.Image, kept: ImageReport | Iterable[int], tiling: Tiling, *, legend: bool = True
) -> Image.Image:
    """The picture with dropped patches greyed out, and kept ones as they are, outlined.

    Class tokens stand for a whole tile and patches in the padding for nothing, so neither has a place in the
    picture; the legend in the lower left corner counts them.

    Args:
        picture: as it was given to the processor.
        kept: an image of a `TrimReport`, or the kept features, counted from the first one of this image.
        tiling: how the processor laid the picture out, from `Tiling.of`.
        legend: whether to write the counts into the picture, if there is room.

    Returns:
        A new RGB picture of the same size; larger where the processor enlarged it, so that patches stay visible.

    Raises:
        InputError: `tiling` is of a picture of another size, or a feature is not one of its tiles'.
    """
    if picture.size != (tiling.width, tiling.height):
        raise InputError(
            f"the picture has {picture.width} x {picture.height} pixels and the layout is of one with "
            f"{tiling.width} x {tiling.height}; make the layout from this picture."
        )
    features = _features(kept, tiling)
    size = max(picture.width, tiling.resized_width), max(picture.height, tiling.resized_height)
    canvas = np.asarray(picture.convert("RGB").resize(size))
    clear = kept_pixels(features, tiling, size)
    dimmed = (canvas @ np.asarray(_GREY) * _DIMMED + _HAZE)[..., None]
    painted = np.where(clear[..., None], canvas, dimmed).astype(np.uint8)
    painted[_edge(clear, max(1, round(min(size) / 300)))] = OUTLINE
    result = Image.fromarray(painted)
    if legend:
        _write(result, legend_text(features, tiling))
    return result


def overlay_report(picture: Image.Image, report: TrimReport, model: Any, processor: Any) -> Image.Image:
    """The `overlay` of the first image of a report's first sample.

    Args:
        picture: as it was given to the processor.
        report: of a generation on this picture.
        model: that the report is of.
        processor: of the model.
    """
    tiling = Tiling.of(picture.size, processor.image_processor, model.config.vision_config.patch_size)
    return overlay(picture, report.samples[0][0], tiling)


def kept_pixels(features: Iterable[int], tiling: Tiling, size: tuple[int, int]) -> NDArray[np.bool_]:
    """[height, width] bool: the pixels of these features in the picture drawn at `size` (width, height)."""
    across, down = size[0] / tiling.width, size[1] / tiling.height
    pixels = np.zeros((size[1], size[0]), dtype=bool)
    for feature in features:
        box = tiling.box(feature)
        if box is not None:
            left, top, right, bottom = box
            pixels[round(top * down) : round(bottom * down), round(left * across) : round(right * across)] = True
    return pixels


def legend_text(features: Iterable[int], tiling: Tiling) -> str:
    """How much was kept of what lies in the picture, and of what has no place in it."""
    everything = range(tiling.feature_count)
    kept = set(features)
    classes = {feature for feature in everything if tiling.is_class_token(feature)}
    placed = {feature for feature in everything if tiling.box(feature) is not None}
    padding = set(everything) - classes - placed
    parts = [
        f"{len(kept & placed)} of {len(placed)} patches",
        f"{len(kept & classes)} of {counted(len(classes), 'class token')}",
    ]
    if padding:
        parts.append(f"{len(kept & padding)} of {len(padding)} padding patches")
    return "kept " + ", ".join(parts)


def check_path(path: Path) -> None:
    """Refuse, before any work is done, a file that `save` could not write.

    Raises:
        InputError: the suffix is unknown, or the folder is not there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} ends in {path.suffix!r}; a picture can be written to {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise InputError(f"{path} lies in a folder that does not exist; create {path.parent} first.")
    if path.is_dir():
        raise InputError(f"{path} is a directory; give the name of a file.")


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    check_path(path)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        picture.save(unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _features(kept: ImageReport | Iterable[int], tiling: Tiling) -> list[int]:
    # A report counts through all images of the prompt.
    indices = (index % kept.features for index in kept.kept_indices) if isinstance(kept, ImageReport) else kept
    features = list(indices)
    for feature in features:
        if not 0 <= feature < tiling.feature_count:
            raise InputError(
                f"feature {feature} is not one of the {tiling.feature_count} of this picture's "
                f"{tiling.rows} x {tiling.columns} tiles."
            )
    return features


def _edge(area: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The outermost `width` pixels of an area, except along the edge of the picture."""
    inside = area.copy()
    for _ in range(width):
        grown = np.pad(inside, 1, constant_values=True)
        inside &= grown[:-2, 1:-1] & grown[2:, 1:-1] & grown[1:-1, :-2] & grown[1:-1, 2:]
    return area & ~inside


def _write(picture: Image.Image, text: str) -> None:
    font = ImageFont.load_default(size=max(11, round(min(picture.size) / 40)))
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    margin = 4
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    if width > picture.width or height > picture.height / 4:
        return
    corner = picture.height - height
    draw.rectangle((0, corner, width, picture.height), fill=(0, 0, 0))
    draw.text((margin - left, corner + margin - top), text, font=font, fill=(255, 255, 255))
