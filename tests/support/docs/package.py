"""Whether what lies in a folder may be published: `python -m tests.support.docs.package dist`."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

from crosstrim import __version__
from tests.support.docs.pages import text

MOST = 25 * 10**6
"""Bytes of the wheel, mini included; PyPI's own limit is 100 MB."""

WHEEL = (
    "crosstrim/py.typed",
    "crosstrim/mini/checkpoint/model.safetensors",
    "crosstrim/mini/heldout/questions.jsonl",
)
SDIST = ("src/crosstrim/py.typed", "tests/conftest.py", "docs/index.md", "pyproject.toml", "CITATION.cff", "LICENSE")
NOT_IN_SDIST = ("evaluation/", "benchmarks/", "tests/docs/", ".github/")


def faults(folder: Path) -> list[str]:
    """What keeps the wheel and the source distribution in this folder from being published."""
    wheel = folder / f"crosstrim-{__version__}-py3-none-any.whl"
    sdist = folder / f"crosstrim-{__version__}.tar.gz"
    found = sorted(folder.iterdir())
    if found != sorted([wheel, sdist]):
        return [
            f"{folder} holds {', '.join(one.name for one in found)}: expected {wheel.name} and {sdist.name} alone"
        ]
    return [*_faults_of_wheel(wheel), *_faults_of_sdist(sdist)]


def _faults_of_wheel(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"crosstrim-{__version__}.dist-info/METADATA").decode()
    size = wheel.stat().st_size
    told = [f"the wheel takes {size} bytes, and may take {MOST}"] if size > MOST else []
    told += [f"the wheel lacks {name}" for name in WHEEL if name not in names]
    told += [f"the wheel holds {name}" for name in names if not name.startswith(("crosstrim/", "crosstrim-"))]
    if "](docs/" in metadata:
        told.append("the description has links that lead nowhere outside of the repository")
    return told


def _faults_of_sdist(sdist: Path) -> list[str]:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    told = [f"the source distribution lacks {name}" for name in SDIST if name not in names]
    if f"\nversion: {__version__}\n" not in text("CITATION.cff"):
        told.append(f"CITATION.cff does not name version {__version__}")
    return told + [f"the source distribution holds {name}" for name in names if name.startswith(NOT_IN_SDIST)]


if __name__ == "__main__":
    sys.exit("\n".join(faults(Path(sys.argv[1]))) or None)
