"""The typefaces of the pages: which, whose, under which licence, and in which split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ImageFont
from recipes.training.files import shipped

_BITSTREAM = "Bitstream Vera licence"
_APACHE = "Apache 2.0"
_OFL = "SIL OFL 1.1"


@dataclass(frozen=True)
class Face:
    """One typeface that ships inside a wheel: its files, all in one folder of the package."""

    name: str
    package: str
    folder: str
    files: tuple[str, ...]
    split: str
    licence: str
    credit: str

    def paths(self) -> list[Path]:
        """Return where its files are.

        Raises:
            ModuleNotFoundError: The package that ships them is not installed.
        """
        return [shipped(self.package, f"{self.folder}/{file}") for file in self.files]


def _plotted(name: str, files: tuple[str, ...], licence: str, credit: str) -> Face:
    return Face(name, "matplotlib", "mpl-data/fonts/ttf", files, "train", licence, credit)


def _dejavu(name: str, *files: str) -> Face:
    return _plotted(name, files, _BITSTREAM, "Bitstream and the DejaVu team")


def _wheel(name: str, files: tuple[str, ...], split: str, licence: str, credit: str) -> Face:
    return Face(name, f"font_{name.lower().replace(' ', '_')}", "files", files, split, licence, credit)


FACES: tuple[Face, ...] = (
    _dejavu("DejaVu Sans", "DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    _dejavu("DejaVu Serif", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    _dejavu("DejaVu Sans Mono", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    _plotted("STIX", ("STIXGeneral.ttf", "STIXGeneralBol.ttf"), _OFL, "STI Pub Companies and MicroPress"),
    _wheel(
        "Roboto",
        ("Roboto-Light.ttf", "Roboto-Regular.ttf", "Roboto-Medium.ttf", "Roboto-Bold.ttf"),
        "train",
        _APACHE,
        "Christian Robertson, Google",
    ),
    _wheel(
        "Source Sans Pro",
        (
            "SourceSansPro-Light.ttf",
            "SourceSansPro-Regular.ttf",
            "SourceSansPro-Semibold.ttf",
            "SourceSansPro-Bold.ttf",
        ),
        "train",
        _OFL,
        "Paul Hunt, Adobe",
    ),
    _wheel(
        "Source Serif Pro",
        ("SourceSerifPro-Regular.ttf", "SourceSerifPro-Semibold.ttf", "SourceSerifPro-Bold.ttf"),
        "train",
        _OFL,
        "Frank Grießhammer, Adobe",
    ),
    _wheel("Manrope", ("Manrope-Regular.ttf", "Manrope-Bold.ttf"), "validation", _OFL, "Mikhail Sharanda"),
    _wheel(
        "Caladea",
        ("Caladea-Regular.ttf", "Caladea-Bold.ttf"),
        "test",
        _APACHE,
        "Carolina Giovagnoli, Huerta Tipográfica",
    ),
    _wheel(
        "Hanken Grotesk",
        ("HankenGrotesk-Regular.otf", "HankenGrotesk-Bold.otf"),
        "test",
        _OFL,
        "Alfredo Marco Pradil",
    ),
)


@cache
def of_split(split: str) -> tuple[Path, ...]:
    """Return the files of one split's typefaces; no typeface is in two."""
    return tuple(path for face in FACES if face.split == split for path in face.paths())


@cache
def load(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Return a typeface at a size in pixels."""
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
