"""Make the embedded model: `python -m recipes.mini`. Stops anywhere, continues where it stopped."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.training import keep_freed_memory
from recipes.training import make as training
from recipes.training.settings import Settings

from . import heldout
from .card import write_card
from .evaluate import RESULTS, brief, evaluate, write
from .settings import SETTINGS, SMOKE
from .task import task

_PACKAGE = Path(__file__).parents[2] / "src" / "crosstrim" / "mini"


def make(settings: Settings, work: Path, package: Path, pictures: int = heldout.PICTURES) -> dict[str, Any]:
    """Train through all stages, write checkpoint, benchmark and examples into the package, and return the log."""
    log = training.train(task(settings), work, package / "checkpoint")
    heldout.write_benchmark(package / "heldout", "test", pictures)
    heldout.write_examples(package / "examples")
    (work / "log.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    return log


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SETTINGS.seed, help="another makes a sibling, beside the package")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default=SETTINGS.precision)
    parser.add_argument("--work", type=Path, help="where training checkpoints go (build/mini, or build/mini-SEED)")
    parser.add_argument("--package", type=Path, help="where the finished model goes (a sibling's: WORK/package)")
    parser.add_argument("--smoke", action="store_true", help="two tiny steps per stage, to see that it runs")
    options = parser.parse_args()
    keep_freed_memory()
    settings = replace(SMOKE if options.smoke else SETTINGS, seed=options.seed, precision=options.precision)
    ships = options.seed == SETTINGS.seed
    work = options.work or Path("build/mini" if ships else f"build/mini-{options.seed}")
    package = options.package or (_PACKAGE if ships else work / "package")
    log = make(settings, work, package)
    validation = heldout.write_benchmark(work / "validation", "validation")
    print("validation:", json.dumps(brief(package / "checkpoint", validation)), flush=True)
    if not options.smoke:
        results = RESULTS if package == _PACKAGE else work / "heldout.json"
        report = evaluate(package / "checkpoint", package / "heldout" / "questions.jsonl")
        write(report, results)
        write_card(package / "checkpoint", settings, log, report, str(results))


if __name__ == "__main__":
    main()
