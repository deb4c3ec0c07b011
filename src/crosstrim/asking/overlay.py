"""Paint what was kept onto the picture it was kept from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from crosstrim.asking.images import MAX_PIXELS
from crosstrim.errors import InputError
from crosstrim.files import written_whole
from crosstrim.models.tiles import Tiling
from crosstrim.trimming.report import ImageReport, TrimReport
from crosstrim.wording import counted

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
"""What `save` writes."""

OUTLINE = (255, 200, 0)
_DIMMED, _HAZE = 0.3, 75  # what is left of the contrast, and how bright black becomes
_GREYS = [round(grey * _DIMMED + _HAZE) for grey in range(256)]
_THINNEST = 24  # pixels; a thinner side is stretched, as nobody could see it
_MAX_RESIZED = MAX_PIXELS // 4  # pixels; leaves room for the copy that resizing makes
_BAND = 1 << 20  # pixels that are greyed out at once
_MARGIN, _LEGEND_WIDTH, _SMALLEST_FONT = 6, 320, 12  # pixels

_Box = tuple[int, int, int, int]  # left, top, right, bottom


def overlay(
    picture: Image.Image, kept: ImageReport | Iterable[int], tiling: Tiling, *, legend: bool = True
) -> Image.Image:
    """The picture with dropped patches greyed out, and kept ones as they are, outlined.

    Class tokens stand for a whole tile and patches in the padding for nothing, so neither has a place in the
    picture; the legend in a strip below it counts them. Beside the picture it takes the memory of the result and
    little more.

    Args:
        picture: as it was given to the processor.
        kept: an image of a `TrimReport`, or the kept features, counted from the first one of this image.
        tiling: how the processor laid the picture out, from `Tiling.of`.
        legend: whether to add the strip with the counts.

    Returns:
        A new RGB picture, with the given one at its top left: at its own size; larger where the processor enlarged
        it, so that patches stay visible; stretched where a side is thinner than 24 pixels.

    Raises:
        InputError: `tiling` is of a picture of another size, a feature is not one of its tiles', or the picture is
            too long and thin to be drawn.
    """
    if picture.size != (tiling.width, tiling.height):
        raise InputError(
            f"the picture has {picture.width} x {picture.height} pixels and the layout is of one with "
            f"{tiling.width} x {tiling.height}; make the layout from this picture."
        )
    check_size(picture.size)
    features = _features(kept, tiling)
    size = (
        max(picture.width, tiling.resized_width, _THINNEST),
        max(picture.height, tiling.resized_height, _THINNEST),
    )
    shown = picture if picture.size == size else picture.convert("RGB").resize(size)
    lines, font = _legend(legend_text(features, tiling), size) if legend else ([], None)
    result = Image.new("RGB", _with_legend(size, lines, font))
    _paint_dimmed(result, shown)
    boxes = _boxes(features, tiling, size)
    for box in boxes:
        result.paste(shown.crop(box).convert("RGB"), box)
    _outline(result, boxes, size)
    _write(result, lines, font, size[1])
    return result


def check_size(size: tuple[int, int]) -> None:
    """Refuse, before any work is done, a picture so long and thin that it cannot be drawn.

    Args:
        size: width and height of the picture.

    Raises:
        InputError: it is.
    """
    width, height = (max(side, _THINNEST) for side in size)
    if (width, height) != size and width * height > _MAX_RESIZED:
        raise InputError(
            f"a picture of {size[0]} x {size[1]} pixels is too thin for an overlay: drawn {_THINNEST} pixels thick "
            f"it has {width * height}, and the limit is {_MAX_RESIZED}. Cut it into shorter ones."
        )


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
        InputError: the path is none that a picture can be written to.
        UnwritableError: it cannot be written.
    """
    check_path(path)
    with written_whole(path) as unfinished:
        picture.save(unfinished)


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


def _paint_dimmed(result: Image.Image, shown: Image.Image) -> None:
    rows = max(1, _BAND // shown.width)
    for top in range(0, shown.height, rows):
        box = (0, top, shown.width, min(top + rows, shown.height))
        greys = shown.crop(box).convert("RGB").convert("L").point(_GREYS)
        result.paste(greys.convert("RGB"), box)


def _boxes(features: Iterable[int], tiling: Tiling, size: tuple[int, int]) -> list[_Box]:
    """Where these features lie in the picture drawn at `size` (width, height)."""
    across, down = size[0] / tiling.width, size[1] / tiling.height
    found = (tiling.box(feature) for feature in dict.fromkeys(features))
    return [
        (round(left * across), round(top * down), round(right * across), round(bottom * down))
        for left, top, right, bottom in filter(None, found)
    ]


def _outline(result: Image.Image, boxes: Iterable[_Box], size: tuple[int, int]) -> None:
    """Draw the border of what was kept, except along the edge of the picture."""
    boxes = set(boxes)
    begins, rights = {box[:2] for box in boxes}, {(box[2], box[1]) for box in boxes}
    belows = {(box[0], box[3]) for box in boxes}
    width, height = size
    thickness = max(1, round(min(size) / 300))
    draw = ImageDraw.Draw(result)
    for left, top, right, bottom in boxes:
        across, down = min(thickness, right - left), min(thickness, bottom - top)
        edges = [
            (left > 0 and (left, top) not in rights, (left, top, left + across, bottom)),
            (right < width and (right, top) not in begins, (right - across, top, right, bottom)),
            (top > 0 and (left, top) not in belows, (left, top, right, top + down)),
            (bottom < height and (left, bottom) not in begins, (left, bottom - down, right, bottom)),
        ]
        for is_border, (begin, upper, end, lower) in edges:
            if is_border:
                draw.rectangle((begin, upper, end - 1, lower - 1), fill=OUTLINE)


def _legend(text: str, size: tuple[int, int]) -> tuple[list[str], Any]:
    """The text in lines that fit below a picture of this size, and its font."""
    font = ImageFont.load_default(size=max(_SMALLEST_FONT, round(min(size) / 40)))
    room = max(size[0], _LEGEND_WIDTH) - 2 * _MARGIN
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines, font


def _with_legend(size: tuple[int, int], lines: Sequence[str], font: Any) -> tuple[int, int]:
    if not lines:
        return size
    widest = max(math.ceil(font.getlength(line)) for line in lines) + 2 * _MARGIN
    return max(size[0], widest), size[1] + _line_height(font) * len(lines) + 2 * _MARGIN


def _line_height(font: Any) -> int:
    return int(sum(font.getmetrics()))


def _write(result: Image.Image, lines: Sequence[str], font: Any, top: int) -> None:
    draw = ImageDraw.Draw(result)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, top + _MARGIN + number * _line_height(font)), line, font=font, fill=(255, 255, 255))
