"""What a row of a file of questions calls its picture, or its pictures: paths, data: URIs, or the files' bytes."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from crosstrim.asking.images import open_image
from crosstrim.errors import InputError

MAX_PICTURES = 8
"""About which one question may be."""

MAX_DATA_BYTES = 32 << 20
"""Of the file of a picture in a data: URI."""

_DATA_URI = re.compile(r"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)

Source = str | bytes
"""A picture: a path, or the bytes of its file."""


def picture_source(image: Any, folder: Path) -> Source:
    """The picture that a row's `image` means; objects are those that Hugging Face datasets write.

    Args:
        image: a path, a data: URI, a file's bytes, or an object with `bytes` (base64 in JSONL) or `path`.
        folder: where relative paths begin; absolute, so that no row means standard input by "-".

    Raises:
        InputError: it is none of these, or larger than a data: URI may be.
    """
    if isinstance(image, dict):
        content = image.get("bytes")
        image = image.get("path") if content is None else content
        if isinstance(content, str):
            image = _decoded(content)
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image or "\0" in image:
        raise InputError("'image' must be a path, a data: URI, or an object with the file's bytes (base64 in JSONL).")
    if image[:5].lower() == "data:":
        return decode_data_uri(image)
    return image if "://" in image else str(folder / image)


def picture_sources(image: Any, folder: Path) -> tuple[Source, ...]:
    """The pictures that a row's `image` means: one, or a list of several.

    Args:
        image: as of `picture_source`, or a list of such.
        folder: likewise.

    Raises:
        InputError: one of them cannot be, or there are none or too many.
    """
    if not isinstance(image, list):
        return (picture_source(image, folder),)
    if not 1 <= len(image) <= MAX_PICTURES:
        raise InputError(
            f"'image' lists {len(image)} pictures; a question is about 1 to {MAX_PICTURES}. Put others into a row of "
            "their own."
        )
    return tuple(_each(image, lambda one: picture_source(one, folder)))


def open_sources(sources: Sequence[Source]) -> list[Image.Image]:
    """The pictures of a row, decoded.

    Raises:
        InputError: one is not there, damaged or too large; of several it is told which.
    """
    return _each(sources, open_source)


def _each(items: Sequence[Any], take: Callable[[Any], Any]) -> list[Any]:
    taken = []
    for number, one in enumerate(items, 1):
        try:
            taken.append(take(one))
        except InputError as error:
            raise InputError(
                f"picture {number} of {len(items)}: {error}" if len(items) > 1 else str(error)
            ) from error
    return taken


def decode_data_uri(
    uri: str, max_bytes: int | None = None, limit_is: str = "the limit of a data: URI is {}. Name its path."
) -> bytes:
    """The file in a data: URI, whose size is known before it is decoded.

    Args:
        uri: data:image/TYPE;base64, and the file.
        max_bytes: of the file; None is `MAX_DATA_BYTES`.
        limit_is: how a refusal tells that limit, and what to do.

    Raises:
        InputError: it is larger, no picture's, or not in base64.
    """
    head = _DATA_URI.match(uri)
    if head is None:
        raise InputError("the data: URI must begin with data:image/TYPE;base64, such as data:image/png;base64,.")
    size = (len(uri) - head.end()) * 3 // 4 - uri[-2:].count("=")
    limit = MAX_DATA_BYTES if max_bytes is None else max_bytes
    if size > limit:
        raise InputError(f"the picture's file has {size} bytes; {limit_is.format(limit)}")
    try:
        return base64.b64decode(uri[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("the data: URI holds no valid base64.") from error


def open_source(source: Source) -> Image.Image:
    """The picture, decoded.

    Raises:
        InputError: there is none, or it is damaged or too large.
    """
    return open_image(io.BytesIO(source) if isinstance(source, bytes) else source)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("the picture's bytes are no base64.") from error
