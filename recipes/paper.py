"""The paper's benchmarks, in one command: `python -m recipes.paper MODEL FOLDER`.

For whoever holds the real weights. lmms-eval runs each benchmark untrimmed, lossless, at the paper's settings and at
crosstrim's own, every one in a process of its own. What is finished stays: after a kill the same command goes on with
the first run that is not. FOLDER/table.md holds what was measured, with the published numbers beside it.

Needs `crosstrim[lmms]`, and `OPENAI_API_KEY` for the judge of LLaVA-Bench.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosstrim.data.pages import Table
from crosstrim.files import read_json, write_json, write_text

SETTINGS = {
    "untrimmed": "trim=False",
    "lossless": "",
    "k=0.25": "k=0.25",
    "k=0.15": "k=0.15",
    "k=0.05": "k=0.05",
    "keep=0.5": "keep=0.5",
    "keep=0.25": "keep=0.25",
}
"""Each with its arguments: the paper's are those with `k`, by its own union, and ours those with `keep`."""


@dataclass(frozen=True)
class Number:
    """A number of a benchmark.

    Attributes:
        title: of its column.
        task: of lmms-eval.
        metric: of the task.
        scale: what it is multiplied with to be shown.
    """

    title: str
    task: str
    metric: str
    scale: float = 1.0


NUMBERS = (
    Number("SEED-Bench, pictures", "seedbench", "seed_image", 100),
    Number("MME, perception", "mme", "mme_perception_score"),
    Number("MME, cognition", "mme", "mme_cognition_score"),
    Number("MMVP, pairs", "mmvp", "mmvp_pair_accuracy", 100),
    Number("LLaVA-Bench", "llava_in_the_wild", "gpt_eval_llava_all"),
)

PUBLISHED = {
    "11B": {"untrimmed": "72.6", "k=0.25": "72.3 (61.5 %)", "k=0.05": "62.3 (14.2 %)"},
    "90B": {"untrimmed": "76.3", "k=0.25": "75.9 (74.2 %)", "k=0.15": "75.4 (51.0 %)"},
}
"""SEED-Bench as the paper is quoted, second-hand and unverified."""


def run(
    model: str, folder: Path, numbers: Sequence[Number] = NUMBERS, arguments: str = "", options: Sequence[str] = ()
) -> list[str]:
    """Run what is not finished, and write the table anew after each.

    Args:
        model: as `crosstrim.load` takes it.
        folder: where results are, or come.
        numbers: what to measure.
        arguments: more of `--model_args`, such as "device_map=auto".
        options: more options of lmms-eval.

    Returns:
        The runs that failed; each one's output is beside where its result would be.
    """
    failed = []
    for task in dict.fromkeys(number.task for number in numbers):
        for setting, own in SETTINGS.items():
            result = folder / setting / f"{task}.json"
            if result.exists():
                continue
            given = ",".join(filter(None, (f"pretrained={model}", own, arguments)))
            if not _measure(task, given, options, result):
                failed.append(f"{setting} {task}")
            write_text(folder / "table.md", page(model, folder, numbers))
    return failed


def _measure(task: str, arguments: str, options: Sequence[str], result: Path) -> bool:
    """Let lmms-eval run one task; whether it ended well, in which case its result is written whole."""
    work, log = result.with_suffix(".running"), result.with_suffix(".log")
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir(parents=True)
    command = [sys.executable, "-m", "lmms_eval", "--model", "crosstrim", "--model_args", arguments]
    command += ["--tasks", task, "--output_path", str(work), "--log_samples", *options]
    with log.open("w", encoding="utf-8") as output:
        ended = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
        )
    found = sorted(work.rglob("*_results.json"))
    if ended.returncode or not found:
        return False
    samples = next(iter(sorted(work.rglob(f"*_samples_{task}.jsonl"))), None)
    if samples is not None:
        samples.replace(result.with_suffix(".samples.jsonl"))
    write_json(result, read_json(found[-1]))
    shutil.rmtree(work)
    return True


def page(model: str, folder: Path, numbers: Sequence[Number] = NUMBERS) -> str:
    """The table of what is finished, as Markdown; the share of the visible features that stayed is in brackets."""
    size = next((size for size in PUBLISHED if size.lower() in model.lower()), None)
    published = PUBLISHED.get(size or "", {})
    rows = tuple(
        (setting, *(_cell(folder / setting, number) for number in numbers), published.get(setting, ""))
        for setting in SETTINGS
    )
    header = ("", *(number.title for number in numbers), "SEED-Bench, published")
    note = (
        "In brackets: kept, in per cent of the visible features. The published numbers are second-hand; compare "
        "trimmed with untrimmed of one run."
    )
    table = Table(f"{model} on the paper's benchmarks", header, rows, note)
    return "\n".join([f"# {table.title}", "", *table.markdown(), "", table.note, ""])


def _cell(folder: Path, number: Number) -> str:
    result = folder / f"{number.task}.json"
    if not result.exists():
        return ""
    found: dict[str, Any] = read_json(result)
    value = found["results"][number.task].get(f"{number.metric},none")
    if value is None:
        return "not reported"
    value *= number.scale
    kept = found.get("throughput", {}).get("avg_kept_fraction")
    return f"{value:.1f}" if kept is None else f"{value:.1f} ({100 * kept:.1f} %)"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.paper", description="The paper's benchmarks.")
    parser.add_argument("model", help="a folder or a Hub id, such as meta-llama/Llama-3.2-11B-Vision-Instruct")
    parser.add_argument("folder", type=Path, help="where results come, and where a killed run goes on")
    parser.add_argument("--tasks", default="", help="some of " + ",".join(dict.fromkeys(one.task for one in NUMBERS)))
    parser.add_argument("--batch-size", default="16")
    parser.add_argument("--model-args", default="", help="more arguments of the model, such as device_map=auto")
    given = parser.parse_args()
    tasks = given.tasks.split(",") if given.tasks else [one.task for one in NUMBERS]
    chosen = [one for one in NUMBERS if one.task in tasks]
    failed = run(given.model, given.folder, chosen, given.model_args, ["--batch_size", given.batch_size])
    print((given.folder / "table.md").read_text(encoding="utf-8"))
    if failed:
        sys.exit(f"failed, see their logs in {given.folder}: {', '.join(failed)}. The same command tries them again.")


if __name__ == "__main__":
    main()
