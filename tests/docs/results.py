"""Write the measured numbers into README and docs: `python -m tests.docs.results`; a test tells when to run it."""

from __future__ import annotations

import json
import re
from statistics import mean
from typing import Any

from tests.docs import pages

PATH = "evaluation/results/mini-heldout.json"
PAGES = ("README.md", "docs/compat.md")

_README = """\
**On "mini"**, measured: per cent of {count} held-out questions answered exactly right, greedy, in
[{path}]({path}).

{table}

*Lookups* ask about one digit; *count* and *read* need the whole picture. *Blind* shows another picture than the one
asked about. *Random* is the control that keeps as many features as the union does, drawn blindly. With *first layer
too* the dropped features are hidden from the first cross-attention layer as well: the stricter test, since otherwise
that layer sees everything once, which flatters every choice. One model, one training run: the numbers say how the
method behaves on this task, not on Llama-3.2-Vision.
"""
_COMPAT = """\
Per cent of {count} held-out questions answered exactly right, untrimmed, greedy, in [{path}](../{path}).
The model was trained with both of these repairs on; *without* leaves a departure unrepaired.

{table}

`causal_without_mask` is not in the table: prompts from the processor always bring a mask.
"""


def _with_seeds_averaged(measured: dict[str, Any]) -> dict[str, Any]:
    seeds = {name: value for name, value in measured.items() if "(seed" in name}
    kept = {name: value for name, value in measured.items() if name not in seeds}
    if seeds:
        kinds = {kind: mean(one["kinds"][kind] for one in seeds.values()) for kind in measured["untrimmed"]["kinds"]}
        averages = {name: mean(one[name] for one in seeds.values()) for name in ("lookups", "all")}
        name = re.sub(r"\(seed \d+\)", f"(mean of {len(seeds)} draws)", next(iter(seeds)))
        kept[name] = {"kinds": kinds, **averages}
    return kept


def _table(results: dict[str, Any], with_kept: bool) -> str:
    header = ["", *(["kept"] if with_kept else []), "lookups", "count", "read", "all questions"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, result in results.items():
        kept = [f"{100 * result['kept']:.1f}" if "kept" in result else ""] if with_kept else []
        kinds = result["kinds"]
        numbers = [f"{one:.1f}" for one in (result["lookups"], kinds["count"], kinds["read"], result["all"])]
        lines.append("| " + " | ".join([name, *kept, *numbers]) + " |")
    return "\n".join(lines)


def written(name: str) -> str:
    """The page with the measured numbers in it."""
    report = json.loads((pages.ROOT / PATH).read_text(encoding="utf-8"))
    results, count = _with_seeds_averaged(report["results"]), sum(report["questions"].values())
    departures = {name: result for name, result in results.items() if name.startswith("without ")}
    if name == "README.md":
        shown = {name: result for name, result in results.items() if name not in departures}
        part = _README.format(count=count, path=PATH, table=_table(shown, with_kept=True))
    else:
        shown = {"untrimmed": results["untrimmed"], **departures}
        part = _COMPAT.format(count=count, path=PATH, table=_table(shown, with_kept=False))
    begin, end = "<!-- results -->", "<!-- end of results -->"
    before, _, rest = pages.text(name).partition(begin)
    assert end in rest, f"{name} has no place for results"
    return f"{before}{begin}\n{part}{end}{rest.partition(end)[2]}"


def main() -> None:
    """Write the pages."""
    for name in PAGES:
        (pages.ROOT / name).write_text(written(name), encoding="utf-8")


if __name__ == "__main__":
    main()
