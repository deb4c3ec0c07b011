"""What a server is started with."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crosstrim.errors import ConfigError

if TYPE_CHECKING:
    from crosstrim.asking.escalation import Budget
    from crosstrim.config import TrimConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")

MAX_IMAGES = 8
"""Pictures in one request."""

DEFAULT_NEW_TOKENS = 256
"""Where an answer is cut off if neither the request says so nor the server's limit is lower."""

BESIDE_PICTURES = 4 << 20
"""Bytes of a body for everything that is no picture."""


def _papers_trim() -> TrimConfig:
    # Here and not above: it imports torch, and the command line's help names the other defaults.
    from crosstrim.config import TrimConfig

    return TrimConfig(k=0.25)


@dataclass(frozen=True)
class Settings:
    """What a server is started with.

    Attributes:
        model: as `crosstrim.load` takes it; clients may give it so, or by `model_id`.
        name: what clients call the model; None is `model`, of a folder its last part.
        dtype: as `crosstrim.load` takes it.
        device: likewise, by the name `device_map`.
        quantization: likewise.
        trim: how to trim where a request does not say.
        escalate: an answer one of whose tokens had a lower probability is made again; None: none is. Requests may say
            otherwise.
        escalate_to: with what, as of `crosstrim.asking.escalation.Escalation.of`.
        max_batch: requests that are answered together.
        max_wait_ms: how long the first of them waits for others.
        queue_limit: requests that may be unfinished at once; further ones get 429.
        timeout: seconds that a request may take in all.
        max_new_tokens: that a request may ask for.
        api_keys: of which every request must carry one, but those to /health, /ready and the schema; none of them
            asks for none.
        allow_remote_images: whether pictures may be fetched over http and https.
        max_image_bytes: of a picture's file.
        max_pixels: of a request's pictures together, which are in memory until it is answered.
        feature_cache_bytes: kept of pictures' features, in case a picture is asked about again.
        cors_origins: of web pages that browsers let talk to this server; "*" is any.
        log: how the lines on stderr are written, "text" or "json".
    """

    model: str = "mini"
    name: str | None = None
    dtype: str | None = None
    device: str | None = None
    quantization: str | None = None
    trim: TrimConfig = field(default_factory=_papers_trim)
    escalate: float | None = None
    escalate_to: tuple[Budget, ...] = ("untrimmed",)
    max_batch: int = 8
    max_wait_ms: float = 5.0
    queue_limit: int = 64
    timeout: float = 120.0
    max_new_tokens: int = 1024
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_remote_images: bool = False
    max_image_bytes: int = 10 << 20
    max_pixels: int = 32_000_000
    feature_cache_bytes: int = 1 << 30
    cors_origins: tuple[str, ...] = ()
    log: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        """Refuse what no client could ask for, or no browser would match.

        Raises:
            ConfigError: the name or an origin cannot be.
        """
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"the model's name {self.name!r} must be up to 128 letters, digits and ._-/: and begin with a letter "
                "or digit."
            )
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"the origin {origin!r} must be as browsers write it, scheme://host or scheme://host:port in "
                    "small letters and without a slash at the end, or *."
                )

    @property
    def model_id(self) -> str:
        """What clients are told: of a local folder the last part alone, as its place is not for them."""
        if self.name is not None:
            return self.name
        folder = Path(self.model).expanduser()
        return os.path.basename(os.path.abspath(folder)) if folder.is_dir() else self.model

    def serves(self, model: str) -> bool:
        """Whether clients may call the model so."""
        return model in (self.model_id, self.model)

    @property
    def max_body_bytes(self) -> int:
        """Of a request: its pictures in base64 and something beside them."""
        return MAX_IMAGES * (self.max_image_bytes * 4 // 3 + 4) + BESIDE_PICTURES
