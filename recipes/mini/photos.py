"""The photographs behind the digits: which, whose, under which licence, and in which split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from recipes.training.files import shipped

_CC0 = "CC0 1.0"
_CC_BY = "CC BY 2.0"
_PUBLIC = "public domain"
LONGEST_SIDE = 640


@dataclass(frozen=True)
class Photo:
    """One photograph that ships inside a wheel."""

    package: str
    path: str
    split: str
    licence: str
    credit: str

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self.path).stem

    def load(self) -> Image.Image:
        """Return the photograph in RGB, at most `LONGEST_SIDE` pixels wide or high."""
        image = Image.open(shipped(self.package, self.path)).convert("RGB")
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        return image


def _skimage(file: str, split: str, licence: str, credit: str) -> Photo:
    return Photo("skimage", f"data/{file}", split, licence, credit)


def _sklearn(file: str, split: str, licence: str, credit: str) -> Photo:
    return Photo("sklearn", f"datasets/images/{file}", split, licence, credit)


# Left out: coins, ihc, lfw, moon, motorcycle, page and text, whose licence is unclear, and all that is no photograph.
PHOTOS: tuple[Photo, ...] = (
    _skimage("astronaut.png", "train", _PUBLIC, "NASA, portrait of Eileen Collins"),
    _skimage("brick.png", "train", _CC0, "CC0Textures, Bricks25"),
    _skimage("camera.png", "train", _CC0, "Lav Varshney"),
    _skimage("cell.png", "train", _CC0, "Paul Müller et al., Optics Express 26(8)"),
    _skimage("clock_motion.png", "train", _PUBLIC, "Stefan van der Walt"),
    _skimage("grass.png", "train", _CC0, "linolafett, DeviantArt Grass-01"),
    _skimage("hubble_deep_field.jpg", "train", _PUBLIC, "NASA, Hubble eXtreme Deep Field"),
    _skimage("retina.jpg", "train", _CC0, "Mikael Häggström, WikiJournal of Medicine 1(2)"),
    _sklearn("flower.jpg", "train", _CC_BY, "vultilion, flickr.com/photos/vultilion/6056698931"),
    _skimage("coffee.png", "validation", _CC0, "Rachel Michetti, courtesy of Pikolo Espresso Bar"),
    _skimage("gravel.png", "validation", _CC0, "CC0Textures, Gravel04"),
    _skimage("chelsea.png", "test", _CC0, "Stefan van der Walt"),
    _skimage("rocket.jpg", "test", _PUBLIC, "SpaceX, launch of DSCOVR"),
    _sklearn("china.jpg", "test", _CC_BY, "danielbuechele, flickr.com/photos/danielbuechele/6061409035"),
)


def of_split(split: str) -> tuple[Photo, ...]:
    """Return the photographs of one split; no photograph is in two."""
    return tuple(photo for photo in PHOTOS if photo.split == split)
