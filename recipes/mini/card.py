"""The model card: written from the settings, the photographs' register and the measured results, never by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.training.settings import LAYOUTS, Settings

from .photos import PHOTOS
from .settings import SETTINGS

_TEMPLATE = Path(__file__).with_name("card.md")

_CHOICES = """\
Choices were made on the validation split, and two of them during its joint stage (more reading and counting in its
lessons: restarted from its beginning once, resumed at step {reading_from} once; the recipe contains both); the test
split was used for the numbers above, and looked at once before, at the end of stage 1 (how many digits the heads
read; nothing was decided by it)."""
_NO_CHOICES = """\
A sibling of the embedded mini: its finished recipe with other weights and other lessons, to see what holds in more
than one run. Nothing was chosen on it, and it does not ship."""


def kinds_table(results: dict[str, Any]) -> str:
    """Per cent right by kind, under the settings that concern the model itself."""
    names = ["untrimmed", "blind", "k=0.25", "without vision_features", "without blind_rows", "without both"]
    lines = ["| kind | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind in results["untrimmed"]["kinds"]:
        lines.append(f"| {kind} | " + " | ".join(f"{results[name]['kinds'][kind]:.1f}" for name in names) + " |")
    lines.append("| **all** | " + " | ".join(f"{results[name]['all']:.1f}" for name in names) + " |")
    return "\n".join(lines)


def trims_table(results: dict[str, Any]) -> str:
    """Per cent right untrimmed and under every trim."""
    lines = ["| setting | lookups | count | read |", "|---|---|---|---|"]
    for name, result in results.items():
        if name == "untrimmed" or "=" in name:
            kinds = result["kinds"]
            lines.append(f"| {name} | {result['lookups']:.1f} | {kinds['count']:.1f} | {kinds['read']:.1f} |")
    return "\n".join(lines)


def write_card(folder: Path, settings: Settings, log: dict[str, Any], report: dict[str, Any], name: str) -> None:
    """Write `README.md` beside the checkpoint.

    Args:
        folder: The checkpoint's folder.
        settings: What it was trained with.
        log: Seconds and parameters of the run.
        report: What `evaluate` measured.
        name: Where that report is kept, for the reader.
    """
    from .pictures import FEWEST, MOST

    ships = settings.seed == SETTINGS.seed
    results, features = report["results"], (settings.tile // settings.patch) ** 2 + 1
    photos = [
        f"| {photo.package}: {photo.name} | {photo.split} | {photo.licence} | {photo.credit} |" for photo in PHOTOS
    ]
    card = _TEMPLATE.read_text(encoding="utf-8").format(
        **settings.to_dict(),
        title="mini" if ships else f"mini-{settings.seed}",
        arguments="" if ships else f" --seed {settings.seed} --precision {settings.precision}",
        choices=_CHOICES.format(reading_from=settings.reading_from) if ships else _NO_CHOICES,
        parameters=log["parameters"] / 1e6,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        minutes=sum(stage["seconds"] for stage in log["stages"].values()) / 60,
        cpu=report["versions"]["cpu"],
        threads="1 thread" if log["threads"] == 1 else f"{log['threads']} threads",
        columns=f"{FEWEST} to {MOST}",
        fewest=FEWEST,
        most=MOST,
        total=sum(report["questions"].values()),
        each=next(iter(report["questions"].values())),
        kinds=kinds_table(results),
        layouts=", ".join(f"{layout} {value:.1f}" for layout, value in results["untrimmed"]["layouts"].items()),
        trims=trims_table(results),
        versions=", ".join(f"{key} {value}" for key, value in report["versions"].items()),
        name=name,
        photos="\n".join(photos),
        features=features,
        all_features=features * max(rows * columns for rows, columns in LAYOUTS),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
