"""The pictures of a request, within limits that hold before anything is decoded."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from crosstrim.asking.images import as_rgb, undecoded
from crosstrim.data.sources import decode_data_uri
from crosstrim.errors import InputError
from crosstrim.server.fetch import fetch
from crosstrim.server.pixels import Pixels, Taken
from crosstrim.server.settings import Settings


@dataclass(frozen=True)
class Picture:
    """A decoded picture and what tells it from others.

    Attributes:
        image: as the model is to see it.
        digest: SHA-256 of its file.
        taken: the pixels of its request, which are in use as long as one of its pictures is.
    """

    image: Image.Image
    digest: bytes
    taken: Taken


def open_pictures(
    urls: Sequence[str], settings: Settings, pixels: Pixels, deadline: float | None = None
) -> tuple[Picture, ...]:
    """The pictures of data: URIs, or of web addresses where the settings allow it.

    Args:
        urls: where they are; what is named twice is opened once.
        settings: the limits.
        pixels: how many may be decoded; what is not free is waited for.
        deadline: `time.monotonic` when nobody waits for them any more; None is never.

    Raises:
        TimeoutError: others were in memory until the deadline.
        InputError: one is damaged, not to be had, or not allowed, or together they are too large.
    """
    heads: dict[str, Image.Image] = {}
    digests: dict[str, bytes] = {}
    left = settings.max_pixels
    for url in dict.fromkeys(urls):
        content = _content(url, settings)
        heads[url] = undecoded(io.BytesIO(content), left)
        digests[url] = hashlib.sha256(content).digest()
        left -= heads[url].width * heads[url].height
    taken = pixels.take(settings.max_pixels - left, deadline)
    opened: dict[str, Picture] = {}
    for url, digest in digests.items():
        with heads.pop(url) as head:  # popped, since it holds what is decoded
            opened[url] = Picture(as_rgb(head), digest, taken)
    return tuple(opened[url] for url in urls)


def _content(url: str, settings: Settings) -> bytes:
    if url[:5].lower() == "data:":
        return decode_data_uri(url, settings.max_image_bytes, "the limit is {}. Make it smaller.")
    if url[:8].lower().startswith(("http://", "https://")):
        if not settings.allow_remote_images:
            raise InputError(
                "this server fetches no pictures from the web; send it as data:image/...;base64, or start the server "
                "with --allow-remote-images."
            )
        return fetch(url, settings.max_image_bytes)
    raise InputError("a picture must be a data:image/...;base64,... URI.")
