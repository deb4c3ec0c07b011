"""Make the model: `python -m recipes.receipts`. Stops anywhere, continues where it stopped."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from recipes.training import keep_freed_memory, make

from .heldout import write_benchmark
from .settings import SETTINGS, SMOKE
from .task import task


def main() -> None:
    """Read the command line, train, and write the checkpoint and the two benchmarks beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SETTINGS.seed)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default=SETTINGS.precision)
    parser.add_argument("--work", type=Path, default=Path("build/receipts"), help="where everything goes")
    parser.add_argument("--smoke", action="store_true", help="two tiny steps per stage, to see that it runs")
    options = parser.parse_args()
    keep_freed_memory()
    settings = replace(SMOKE if options.smoke else SETTINGS, seed=options.seed, precision=options.precision)
    log = make.train(task(settings), options.work, options.work / "checkpoint")
    (options.work / "log.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    for split in ("validation", "test"):
        write_benchmark(options.work / split, split)


if __name__ == "__main__":
    main()
