"""Files that the tasks read and write: what ships inside wheels, pictures with signs of wear, benchmarks."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_QUALITY = 92


def shipped(package: str, path: str) -> Path:
    """Return where a file of an installed package is.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is needed for what ships with it: pip install crosstrim[recipe]")
    return Path(spec.submodule_search_locations[0]) / path


def finish(
    canvas: np.ndarray,
    rng: np.random.Generator,
    rough: bool,
    noise: float,
    quality: tuple[int, int],
    subsampling: int,
) -> np.ndarray:
    """Return a canvas as bytes; training pictures (`rough`) get noise and at times a trip through JPEG.

    Args:
        canvas: Floats [height, width, 3] from 0 to 255.
        rng: Decides how much of each.
        rough: Whether it is a training picture.
        noise: The largest standard deviation.
        quality: Of JPEG, from and up to.
        subsampling: Of JPEG's colours, as Pillow numbers it.
    """
    if rough:
        grain = rng.standard_normal((*canvas.shape[:2], 1), dtype=np.float32)
        canvas = canvas + grain * np.float32(rng.uniform(0, noise))
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    if not rough or rng.random() < 0.6:
        return pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(*quality)), subsampling=subsampling)
    return np.asarray(Image.open(buffer))


def save(pixels: np.ndarray, path: Path) -> None:
    """Write a picture of a benchmark, in full colour resolution: strokes are thin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)


def write_questions(folder: Path, rows: Iterable[dict[str, Any]], name: str = "questions") -> Path:
    """Write `questions.jsonl`, or another name, into a benchmark's folder and return its path."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def others_alike(rows: Iterable[dict[str, Any]], *fields: str) -> dict[str, str]:
    """Return for each picture of a benchmark the next one whose questions have the same values in these fields."""
    alike: dict[tuple[Any, ...], dict[str, None]] = {}
    for row in rows:
        alike.setdefault(tuple(row[field] for field in fields), {})[row["image"]] = None
    others: dict[str, str] = {}
    for group in map(list, alike.values()):
        others |= dict(zip(group, group[1:] + group[:1], strict=True))
    return others
