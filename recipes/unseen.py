"""Questions unlike those that mini was trained on: `python -m recipes.unseen FOLDER`.

How far do trimmed answers stay those of the untrimmed model where the data are strange? Each group of pictures
departs from mini's training in one way, and the last in all of them. Whether the answers are right matters little
here; the question is whether they change. Needs `crosstrim[recipe,viz]`: matplotlib has the fonts and a photograph.
docs/evaluation.md has the command that asks them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from recipes.mini.digits import GLYPH_SIDES, Stamp, stamps_by_value
from recipes.mini.pictures import COLOURS, FEWEST, MOST, PLACES, Digit, Scene, background, centre_in, finish, paint
from recipes.mini.questions import KINDS, ask
from recipes.mini.settings import TILE
from recipes.training.files import write_questions
from recipes.training.settings import LAYOUTS

SEED = 47
PICTURES = 16
"""Of each group, the same number of each layout."""

FONTS = ("DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Oblique", "STIXGeneralBolIta", "cmtt10")
MOST_TURN = 60.0
"""Degrees, to either side; training turns digits by 7."""


@dataclass(frozen=True)
class Departure:
    """What a group of pictures does otherwise than mini's training.

    Attributes:
        photograph: a portrait and drawn textures lie behind the digits.
        font: digits are set in fonts, and not written by hand.
        turned: digits are turned by up to `MOST_TURN`.
        anywhere: digits stand wherever there is room, also on the borders of the nine places.
        many: a picture has six or seven digits.
    """

    photograph: bool = False
    font: bool = False
    turned: bool = False
    anywhere: bool = False
    many: bool = False


GROUPS = {
    "photographs": Departure(photograph=True),
    "fonts": Departure(font=True),
    "turned": Departure(turned=True),
    "anywhere": Departure(anywhere=True),
    "many": Departure(many=True),
    "all": Departure(True, True, True, True, True),
}


@cache
def _portrait() -> Image.Image:
    """Grace Hopper, by James S. Davis for the US Navy: in the public domain."""
    return Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")


def _other_background(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A crop of the portrait, or a texture: coarse coloured noise, stripes or squares. Dimmed as in training."""
    kind = int(rng.integers(4))
    if kind == 0:
        portrait = _portrait()
        zoom = min(portrait.width / width, portrait.height / height) * rng.uniform(0.35, 1.0)
        left = rng.uniform(0, portrait.width - width * zoom)
        top = rng.uniform(0, portrait.height - height * zoom)
        box = (left, top, left + width * zoom, top + height * zoom)
        canvas = np.asarray(portrait.resize((width, height), Image.Resampling.BILINEAR, box=box), np.float32)
    elif kind == 1:
        coarse = rng.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), dtype=np.uint8)
        canvas = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    else:
        y, x = np.mgrid[:height, :width]
        period = rng.uniform(8, 30)
        wave = np.sin(x / period) * (np.sin(y / period) if kind == 2 else 1.0) > 0
        dark, light = rng.uniform(0, 255, (2, 3))
        canvas = np.where(wave[..., None], light, dark).astype(np.float32)
    return canvas * np.float32(rng.uniform(0.4, 0.7))


def _typeset(value: int, rng: np.random.Generator) -> Stamp:
    """A digit in one of the fonts, of the size and softness of the handwritten ones."""
    side = int(rng.integers(GLYPH_SIDES[0], GLYPH_SIDES[1] + 1))
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FONTS[rng.integers(len(FONTS))]}.ttf"
    box = side + 12
    image = Image.new("L", (box, box))
    ImageDraw.Draw(image).text(
        (box / 2, box / 2), str(value), fill=255, font=ImageFont.truetype(str(file), side), anchor="mm"
    )
    return _stamp(value, side, image)


def _turned(stamp: Stamp, rng: np.random.Generator) -> Stamp:
    ink = Image.fromarray((stamp.ink[..., 0] * 255).astype(np.uint8))
    turned = ink.rotate(float(rng.uniform(-MOST_TURN, MOST_TURN)), Image.Resampling.BICUBIC)
    return _stamp(stamp.value, stamp.side, turned)


def _stamp(value: int, side: int, drawn: Image.Image) -> Stamp:
    ink = np.asarray(drawn, np.float32) / 255
    soft = np.asarray(drawn.filter(ImageFilter.GaussianBlur(2.5)), np.float32) / 255
    return Stamp(value, side, ink[..., None], np.clip(soft * 2.5, 0, 1)[..., None])


def _centres(
    count: int, anywhere: bool, width: int, height: int, rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Points for as many digits, in reading order of the nine places and at least a digit apart."""
    if not anywhere:
        cells = sorted(rng.choice(9, count, replace=False))
        return [centre_in(int(one), width, height, rng, scale=1) for one in cells]
    edge, found = 17.0, []
    while len(found) < count:
        x, y = rng.uniform(edge, width - edge), rng.uniform(edge, height - edge)
        if all(max(abs(x - other), abs(y - another)) > 28 for other, another in found):
            found.append((float(x), float(y)))
    return sorted(found, key=lambda point: _cell(point, width, height))


def _cell(point: tuple[float, float], width: int, height: int) -> int:
    return int(point[1] * 3 // height) * 3 + int(point[0] * 3 // width)


def scene(departure: Departure, layout: tuple[int, int], rng: np.random.Generator) -> Scene:
    """Draw a picture that departs from the training's.

    Args:
        departure: how.
        layout: rows and columns of tiles.
        rng: decides everything else.
    """
    height, width = layout[0] * TILE, layout[1] * TILE
    behind = _other_background(width, height, rng) if departure.photograph else background("test", width, height, rng)
    canvas = np.array(behind, np.float32)
    count = int(rng.integers(6, 8) if departure.many else rng.integers(FEWEST, MOST + 1))
    values = rng.choice(10, count, replace=False)
    colours = rng.choice(list(COLOURS), count, replace=False)
    digits = []
    centres = _centres(count, departure.anywhere, width, height, rng)
    for value, colour, centre in zip(values.tolist(), colours.tolist(), centres, strict=True):
        written = stamps_by_value("test")[value]
        stamp = _typeset(value, rng) if departure.font else written[rng.integers(len(written))]
        stamp = _turned(stamp, rng) if departure.turned else stamp
        paint(canvas, stamp, colour, centre, rng)
        digits.append(Digit(value, colour, PLACES[_cell(centre, width, height)], centre, stamp.side))
    return Scene(finish(canvas, rng, rough=False), layout, tuple(digits))


def write(folder: Path) -> Path:
    """Write the pictures and `questions.jsonl`, whose ids begin with the group, and return the latter's path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for place, (group, departure) in enumerate(GROUPS.items()):
        for number in range(PICTURES):
            rng = np.random.default_rng([SEED, place, number])
            layout = LAYOUTS[number % len(LAYOUTS)]
            item = scene(departure, layout, rng)
            image = f"images/{group}-{number:02d}.png"
            Image.fromarray(item.pixels).save(folder / image)
            for kind in KINDS:
                one = ask(item, kind, rng)
                row = {"id": f"{group}-{number:02d}-{kind}", "image": image, "question": one.text}
                row |= {"answers": [one.answer], "kind": kind, "layout": f"{layout[0]}x{layout[1]}"}
                rows.append(row)
    return write_questions(folder, rows)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
