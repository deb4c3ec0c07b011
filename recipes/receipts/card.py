"""The model card, written from the log of the training and the measurements: `python -m recipes.receipts.card`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recipes.mini.evaluate import versions

from crosstrim.data.pages import Table

from .fonts import FACES
from .settings import SETTINGS

RESULTS = Path("evaluation/results")
CARD = Path("evaluation/cards/receipts.md")
_TEMPLATE = Path(__file__).with_name("card.md")
_SHOWN = {"k=0.25": ("k", "union k=0.25"), "keep=0.1": ("policies", "contribution keep=0.1")}


def kinds_table(measured: dict[str, dict[str, Any]]) -> str:
    """Per cent right by kind: untrimmed, blind, and under two trims.

    Args:
        measured: The results by name: "policies", "k" and "blind".
    """
    found = {"untrimmed": ("policies", "untrimmed"), "blind": ("blind", "untrimmed"), **_SHOWN}
    rows = {name: _row(measured[result], group) for name, (result, group) in found.items()}
    lines = [(kind, *(_right(row["kinds"][kind]) for row in rows.values())) for kind in rows["untrimmed"]["kinds"]]
    lines.append(("**all**", *(_right(row["overall"]) for row in rows.values())))
    return "\n".join(Table("", ("kind", *rows), tuple(lines), "").markdown())


def _row(result: dict[str, Any], group: str) -> dict[str, Any]:
    row: dict[str, Any] = next(one for one in result["summary"] if one["group"] == group)
    return row


def _right(cell: dict[str, Any]) -> str:
    return f"{100 * cell['accuracy']['mean']:.1f}"


def pages_of(result: dict[str, Any]) -> int:
    """How many pages the questions of a result are about."""
    return len({item["id"].partition("-")[0] for item in result["items"]})


def written(log: dict[str, Any], measured: dict[str, dict[str, Any]], size: int, cpu: str) -> str:
    """Return the card.

    Args:
        log: Seconds and parameters of the training.
        measured: The results by name: "policies", "k" and "blind".
        size: Bytes of the weights.
        cpu: What they were trained on.
    """
    features, run = (SETTINGS.tile // SETTINGS.patch) ** 2 + 1, measured["policies"]
    minutes = {name: stage["seconds"] / 60 for name, stage in log["stages"].items()}
    return _TEMPLATE.read_text(encoding="utf-8").format(
        **log["settings"],
        **minutes,
        minutes=sum(minutes.values()),
        parameters=log["parameters"] / 1e6,
        megabytes=size / 1e6,
        cpu=cpu,
        threads=log["threads"],
        total=run["dataset"]["questions"],
        pages=pages_of(run),
        features=features,
        all_features=4 * features,
        kinds=kinds_table(measured),
        versions=", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        faces="\n".join(f"| {face.name} | {face.split} | {face.licence} | {face.credit} |" for face in FACES),
    )


def main() -> None:
    """Write the card of a finished model, once `crosstrim eval` has measured it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/receipts"), help="where the recipe put everything")
    work = parser.parse_args().work
    log = json.loads((work / "log.json").read_text(encoding="utf-8"))
    measured = {
        name: json.loads((RESULTS / f"receipts-{name}.json").read_text(encoding="utf-8"))
        for name in ("policies", "k", "blind")
    }
    size = (work / "checkpoint" / "model.safetensors").stat().st_size
    CARD.write_text(written(log, measured, size, versions()["cpu"]), encoding="utf-8")


if __name__ == "__main__":
    main()
