"""The pictures of a request, within limits that hold before anything is decoded."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from dataclasses import dataclass

from PIL import Image

from crosstrim.asking.images import open_image
from crosstrim.data.sources import decode_data_uri
from crosstrim.errors import InputError
from crosstrim.server.fetch import fetch
from crosstrim.server.settings import Settings

DECODERS = 2
"""Pictures that this process decodes at once: while one is, it takes up to five times what it takes afterwards."""

_DECODING = threading.BoundedSemaphore(DECODERS)


@dataclass(frozen=True)
class Picture:
    """A decoded picture and what tells it from others.

    Attributes:
        image: as the model is to see it.
        digest: SHA-256 of its file.
    """

    image: Image.Image
    digest: bytes


def open_picture(
    url: str, settings: Settings, max_pixels: int | None = None, deadline: float | None = None
) -> Picture:
    """The picture of a data: URI, or of a web address where the settings allow it.

    Args:
        url: where it is.
        settings: the limits.
        max_pixels: what is left of the settings' for this picture; None is all.
        deadline: `time.monotonic` when nobody waits for it any more; None is never.

    Raises:
        TimeoutError: others were being decoded until the deadline.
        InputError: it is too large, damaged, not to be had, or not allowed.
    """
    content = _content(url, settings)
    pixels = settings.max_pixels if max_pixels is None else max_pixels
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    if not _DECODING.acquire(timeout=left):
        raise TimeoutError
    try:
        return Picture(open_image(io.BytesIO(content), pixels), hashlib.sha256(content).digest())
    finally:
        _DECODING.release()


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
