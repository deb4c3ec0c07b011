"""Open pictures: everything that is not plainly a picture of reasonable size is refused in words."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from crosstrim import mini
from crosstrim.errors import InputError

MAX_PIXELS = 64_000_000
"""Largest picture, in pixels; the largest model sees 5 million."""

# What cameras, phones and screenshots write. Pillow knows more, some of which start other programs.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")

# How files begin that are pictures to a person and not to crosstrim. Pillow reads some of them with packages of their
# own, or with decoders that are not worth their risk.
_OTHER_FORMATS = (
    ("HEIC", re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)),
    ("JPEG 2000", re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51")),
    ("JPEG XL", re.compile(rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a")),
    ("ICO", re.compile(rb"\0\0[\1\2]\0")),
)


def open_image(source: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture as the model is to see it: upright, RGB, transparency on white, the first frame.

    Args:
        source: a path, "-" for standard input, or a binary file object.
        max_pixels: of the largest picture that is decoded.

    Returns:
        The decoded picture.

    Raises:
        InputError: there is no picture, it is damaged, in another format, empty, or too large.
    """
    with undecoded(source, max_pixels) as picture:
        return as_rgb(picture, _name(source), max_pixels)


def undecoded(source: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture of which only the head was looked at, for `as_rgb`.

    Args:
        source: as of `open_image`.
        max_pixels: of the largest picture.

    Raises:
        InputError: there is no picture, or it is in another format, empty, or too large.
    """
    name = _name(source)
    content = read(source)
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower, and says so
            picture = Image.open(io.BytesIO(content), formats=[one for one in _FORMATS if one in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise _too_large(name, f"more than {max_pixels} pixels", max_pixels) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} {_unknown(content)}; it reads {', '.join(_FORMATS)}.") from error
    except Exception as error:  # decoders raise anything on hostile bytes
        raise InputError(f"{name} is damaged: {error}.") from error
    _check_size(picture, name, max_pixels)
    return picture


def as_rgb(picture: Image.Image, name: str = "the picture", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An opened picture as the model is to see it: upright, RGB, transparency on white, the first frame.

    Args:
        picture: of Pillow, perhaps not decoded yet.
        name: what to call it in an error.
        max_pixels: of the largest picture that is decoded.

    Raises:
        InputError: it is damaged, has no defined brightness, or is too large.
    """
    _check_size(picture, name, max_pixels)
    try:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders raise anything on hostile bytes
        raise InputError(f"{name} is damaged or cut off: {error}.") from error
    return _to_rgb(upright, name)


def find(name: str) -> str:
    """The path that a name given by a person stands for.

    Args:
        name: a path, "-", "example" for the first picture that ships with crosstrim, or the name of one of them,
            which is its file's without the suffix. A file of that name comes first.

    Raises:
        InputError: a plain name is neither a file nor an example; the message suggests the nearest.
    """
    if name == "-" or Path(name).exists() or Path(name).name != name or Path(name).suffix:
        return name
    examples = {Path(example["image"]).stem: str(example["image"]) for example in mini.examples()}
    if name == "example":
        return next(iter(examples.values()))
    if name not in examples:
        near = difflib.get_close_matches(name, [*examples, "example"], n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Check the path."
        known = ", ".join(examples)
        raise InputError(f"there is no picture {name!r}, and no example of that name; there are {known}. {hint}")
    return examples[name]


def _name(source: str | os.PathLike[str] | BinaryIO) -> str:
    if source == "-":
        return "standard input"
    return str(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "the picture"))


def read(source: str | os.PathLike[str] | BinaryIO) -> bytes:
    """The whole source, so that no file stays open.

    Args:
        source: as of `open_image`.

    Raises:
        InputError: there is nothing to read.
    """
    name = _name(source)
    if isinstance(source, str | os.PathLike) and source != "-":
        content = _file_bytes(Path(source).expanduser(), name)
    elif source == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed; pipe a picture into it.")
        if sys.stdin.isatty():
            raise InputError(
                "standard input is a terminal; pipe a picture into it, as in `crosstrim ask - ... < photo.jpg`."
            )
        content = sys.stdin.buffer.read()
    else:
        content = source.read()  # type: ignore[union-attr]
    if not content:
        raise InputError(f"{name} is empty; a picture was expected.")
    return content


def _file_bytes(path: Path, name: str) -> bytes:
    if name.startswith(("http://", "https://")):
        raise InputError(f"{name} is a web address, which crosstrim does not open; download the picture first.")
    try:
        if path.is_dir():
            raise InputError(f"{name} is a directory; give a picture.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"there is no picture {name}; check the path.") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}.") from error
    except InputError:
        raise
    except ValueError as error:  # half a character, or a zero byte
        raise InputError(f"{name!a} cannot be the name of a file; check the path.") from error


def _unknown(content: bytes) -> str:
    for kind, begins in _OTHER_FORMATS:
        if begins.match(content):
            return f"is {kind}, which crosstrim does not read; convert it, for example to PNG or JPEG"
    return "is no picture that crosstrim reads, or its beginning is damaged"


def _check_size(picture: Image.Image, name: str, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise _too_large(name, f"{picture.width} x {picture.height} pixels", max_pixels)


def _too_large(name: str, size: str, limit: int) -> InputError:
    words = f"{limit // 1_000_000} million" if limit >= 1_000_000 else str(limit)
    return InputError(f"{name} has {size}; the limit is {words} pixels. Make it smaller.")


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow would cut 16-bit greys off at 255, which is almost black.
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise InputError(f"{name} holds {picture.mode!r} values, whose brightness is not defined; save it as 8-bit.")
    if picture.has_transparency_data:
        layers = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return picture.convert("RGB")
