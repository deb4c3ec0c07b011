"""What crosstrim works with that is newer here than constraints.txt pins: `python -m tests.support.newer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

PINS = Path("constraints.txt")
EXTRAS = ("serve", "quant")
BENEATH = ("huggingface-hub", "tokenizers", "starlette")  # not named by pyproject.toml, and felt when they change


def main() -> None:
    """Print each with both versions; nothing where the tests of the pinned versions have tried it all."""
    print(", ".join(newer(PINS.read_text(encoding="utf-8"))))


def newer(pins: str, installed: Callable[[str], str] = version) -> Iterator[str]:
    """Every package whose installed version, without its build such as +cpu, is not the pinned one."""
    versions = pinned(pins)
    for name in sorted(_works_with()):
        here = installed(name).partition("+")[0]
        if here != versions[name]:
            yield f"{name} {here} (pinned {versions[name]})"


def pinned(pins: str) -> dict[str, str]:
    """The version of every package."""
    return dict(line.split("==") for line in pins.splitlines() if "==" in line)


def _works_with() -> set[str]:
    named = map(Requirement, requires("crosstrim") or ())
    environments = [{"extra": extra} for extra in ("", *EXTRAS)]
    return {one.name for one in named if not one.marker or any(map(one.marker.evaluate, environments))} | {*BENEATH}


if __name__ == "__main__":
    main()
