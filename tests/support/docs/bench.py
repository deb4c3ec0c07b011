"""The part of docs/performance.md about the suites: what they measure, their bars, and what was committed of them."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from crosstrim.bench import bars, page
from crosstrim.bench.suites import SUITES
from tests.support.docs import pages

FOLDER = "benchmarks/results"
OLDEST = f"{FOLDER}/layers-transformers-5.17.json"
"""The suite "layers" once more, on the oldest transformers that is supported."""

_PART = """\
| suite | measures |
|---|---|
{suites}

`--check` holds a run against the bars of its suite:

| bar | suite | at most | measured |
|---|---|---:|---:|
{bars}

{results}
"""
_OLDEST = """\
**On transformers {version}** ([{name}](../{file})) an untrimmed step takes {slower:.0f} times as long: it hands
attention one row of queries for each of four heads that share a key head, which PyTorch computes slowly on a CPU.
There the same step takes {half:.2f} of the untrimmed time at keep=0.5, and {quarter:.2f} at keep=0.25.
"""


def committed() -> dict[str, dict[str, Any]]:
    """By suite, the result that is kept in the repository, where there is one."""
    files = {name: f"{FOLDER}/{name}.json" for name in SUITES}
    return {name: json.loads(pages.text(file)) for name, file in files.items() if (pages.ROOT / file).is_file()}


def part(results: dict[str, dict[str, Any]]) -> str:
    """What stands between the marks, of these results."""
    missing = [f'"{name}"' for name in SUITES if name not in results]
    sections = [_section(result) for result in results.values()]
    if missing:
        sections.append(f"**Not measured** by a full run: {', '.join(missing)}.")
    if "layers" in results and (pages.ROOT / OLDEST).is_file():
        sections.append(_oldest(results["layers"], json.loads(pages.text(OLDEST))))
    return _PART.format(
        suites="\n".join(f"| `{suite.name}` | {suite.what} |" for suite in SUITES.values()),
        bars="\n".join(_bar(bar, results.get(bar.suite)) for bar in bars.BARS),
        results="\n\n".join(sections),
    )


def _oldest(newest: dict[str, Any], oldest: dict[str, Any]) -> str:
    def step(result: dict[str, Any], field: str, way: str, trim: str) -> float:
        place = {"phase": "decode", "dtype": "float32", "layer": "all", "way": way, "trim": trim, "tiles": None}
        return bars.only(result["rows"], field, **place)

    return textwrap.fill(
        _OLDEST.format(
            version=oldest["versions"]["transformers"],
            name=OLDEST.rpartition("/")[2],
            file=OLDEST,
            slower=step(oldest, "ms", "untrimmed", "") / step(newest, "ms", "untrimmed", ""),
            half=step(oldest, "ratio", "crosstrim", "keep=0.5"),
            quarter=step(oldest, "ratio", "crosstrim", "keep=0.25"),
        ).replace("\n", " "),
        118,
        break_on_hyphens=False,
    )


def _bar(bar: bars.Bar, result: dict[str, Any] | None) -> str:
    measured = "not measured"
    if result is not None:
        figure = bar.figure(result["rows"])
        measured = f"{figure:.3g} {bar.unit}".rstrip() + ("" if figure <= bar.limit else ", missed")
    return f"| {bar.name} | `{bar.suite}` | {bar.limit:.3g} {bar.unit}".rstrip() + f" | {measured} |"


def _section(result: dict[str, Any]) -> str:
    table, hardware, versions = next(page.tables(result)), result["hardware"], result["versions"]
    machine = ", ".join([hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]])
    facts = (
        f"Measured once, on {machine}, {hardware['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']} ([{result['suite']}.json](../{FOLDER}/{result['suite']}.json))."
    )
    lines = [f"### Suite {result['suite']}", "", textwrap.fill(facts, 118, break_on_hyphens=False), ""]
    return "\n".join([*lines, *table.markdown()])
