"""Write the measured numbers into README and docs: `python -m tests.support.docs.results`; a test tells when to."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from statistics import mean
from typing import Any

from crosstrim.data.pages import Table
from crosstrim.eval import analysis_page, kv_table
from crosstrim.memory import SHAPES
from tests.support.docs import (
    bench,
    calibration,
    capacity,
    escalation,
    gains,
    merging,
    pages,
    per_request,
    policies,
    quantised,
    rules,
    siblings,
    unseen,
)

HELDOUT = "evaluation/results/mini-heldout.json"
SWEEP = "evaluation/results/mini-sweep.jsonl"
ANALYSIS = "evaluation/results/mini-analysis.json"
KV_DTYPES = "evaluation/results/mini-kv-dtype.json"
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/compat.md",
    "docs/analysis.md",
    "docs/calibration.md",
    "docs/evaluation.md",
    "docs/method.md",
    "docs/performance.md",
    "docs/scaling.md",
)
BUDGETS = (0.2, 0.1, 0.05)

_README = """\
| "mini", measured | features kept | right answers | {others} |
|---|---:|---:|---:|
{rows}
"""
_ACCURACY = """\
Measured: per cent of {count} held-out questions answered exactly right, greedy
([mini-sweep.jsonl](../{sweep}), [mini-policies.json](../{comparison}),
[mini-heldout.json](../{heldout})).

{table}

*Kept* is the share of the visible features, in per cent. *Lookups* ask about one digit; *count* and *read* need the
whole picture. `k` uses the paper's *union* and `keep` uses *contribution*, which is ours, unless another policy is
named. *Random* keeps the same number of features, drawn blindly. *First layer too* also hides the dropped features
from the first cross-attention layer, which otherwise sees everything once and so flatters every choice. *Blind* shows
the model a different picture from the one it is asked about. This is one small model and one task: the numbers show
that the method works as described, not how well it does on Llama-3.2-Vision. [Two more training
runs](#in-more-than-one-training-run) show what holds beyond this one.
"""
_COMPAT = """\
Per cent of {count} held-out questions answered exactly right, untrimmed, greedy
([mini-heldout.json](../{heldout})).
The model was trained with both of these repairs on; *without* leaves one off.

{table}

`causal_without_mask` is not in the table: prompts from the processor always bring a mask.
"""
_ANALYSIS = """\
Measured on all {count} held-out questions of "mini", prompts only, in float32 on a CPU
([mini-analysis.json](../{analysis})).

{measured}

So on mini half of a layer's attention lies on {half} % of the features or less, but the tail is long: 90 % of it
takes {ninety} %. The layers' top tenths share {shared} %, where chance is {chance} %. At k=0.05 the first layer's
union holds {held} % of the later layers' attention with {kept} % of the features; as many features could hold
{most} %.

## KV bytes of image and text

Computed from the published shapes, not measured.

{computed}
"""
_KV_DTYPES = """\
On {count} of mini's held-out questions, in per cent ([mini-kv-dtype.json](../{kv_dtypes})).
*Cache* is the share of the visible features' float32 keys and values that is held, *right* counts right answers,
*unchanged* those that are the untrimmed model's.

{table}

Mini's heads are small, so the scales weigh more than on the real models. Its answers have few tokens, and the first
of them never reads a rounded number: this says little about long answers.
"""


@dataclass(frozen=True)
class Row:
    """One setting; accuracies in per cent."""

    name: str
    kept: float | None
    lookups: float
    count: float
    read: float
    overall: float

    @classmethod
    def of_heldout(cls, name: str, result: dict[str, Any], kept: float | None = None) -> Row:
        kinds = result["kinds"]
        return cls(name, kept, result["lookups"], kinds["count"], kinds["read"], result["all"])

    @classmethod
    def of_sweep(cls, result: dict[str, Any]) -> Row:
        accuracy, config = result["trimmed"]["accuracy"], result["config"]
        name = f"k={config['k']}" if config["k"] else f"keep={config['keep']}"
        kinds = {kind: 100 * share for kind, share in accuracy["kinds"].items()}
        lookups = mean(share for kind, share in kinds.items() if kind not in ("count", "read"))
        kept = 100 * result["trimmed"]["kept_fraction"]["overall"]
        return cls(name, kept, lookups, kinds["count"], kinds["read"], 100 * accuracy["overall"])

    @classmethod
    def of_comparison(cls, row: dict[str, Any]) -> Row:
        kinds = {kind: 100 * cell["accuracy"]["mean"] for kind, cell in row["kinds"].items()}
        lookups = mean(share for kind, share in kinds.items() if kind not in policies.WHOLE_OF_IT)
        policy, keep = row["group"].split()
        overall = row["overall"]
        name = f"{keep} {policy}" + (f" (mean of {row['seeds']} draws)" if row["seeds"] > 1 else "")
        return cls(
            name,
            100 * overall["kept_fraction"],
            lookups,
            kinds["count"],
            kinds["read"],
            100 * overall["accuracy"]["mean"],
        )

    @classmethod
    def mean_of(cls, name: str, rows: list[Row]) -> Row:
        means = [mean(getattr(row, field) for row in rows) for field in ("lookups", "count", "read", "overall")]
        return cls(name, rows[0].kept, *means)

    def cells(self, with_kept: bool) -> list[str]:
        kept = "" if self.kept is None else f"{self.kept:.1f}"
        numbers = [f"{one:.1f}" for one in (self.lookups, self.count, self.read, self.overall)]
        return [self.name, *([kept] if with_kept else []), *numbers]


def rows_of_accuracy(measured: dict[str, Any]) -> list[Row]:
    sweep = [Row.of_sweep(json.loads(line)) for line in pages.text(SWEEP).splitlines()]
    kept = {row.name: row.kept for row in sweep}["keep=0.07"]
    strict = [Row.of_heldout(name, one, kept) for name, one in measured.items() if "first layer too" in name]
    seeds = [row for row in strict if "seed" in row.name]
    return [
        Row.of_heldout("untrimmed", measured["untrimmed"], 100.0),
        *[row for row in sweep if row.name.startswith("k=")],
        *rows_of_budgets(),
        *[row for row in strict if row not in seeds],
        Row.mean_of(re.sub(r"\(seed \d+\)", f"(mean of {len(seeds)} draws)", seeds[0].name), seeds),
        Row.of_heldout("blind", measured["blind"]),
    ]


def rows_of_the_readme(measured: dict[str, Any]) -> str:
    """The few rows of the table above that tell the story, and what two more training runs say of each."""
    shown = {"untrimmed": "untrimmed", "k=0.25": "`k=0.25`, the paper's rule"}
    shown |= {f"keep={keep} contribution": f"`keep={keep}`" for keep in (0.2, 0.1)}
    rows = {re.sub(r" \(mean of .*", "", row.name): row for row in rows_of_accuracy(measured) if ", " not in row.name}
    lines = []
    for name, words in {**shown, "keep=0.1 random": "as many, at random"}.items():
        others = " and ".join(f"{siblings.accuracy(model, name):.1f} %" for model in siblings.MODELS[1:])
        lines.append(f"| {words} | {rows[name].kept:.1f} % | {rows[name].overall:.1f} % | {others} |")
    return "\n".join(lines)


def rows_of_budgets() -> list[Row]:
    found = {row["group"]: row for row in json.loads(pages.text(policies.RESULTS[0]))["summary"]}
    names = ("contribution", "union", "random")
    return [Row.of_comparison(found[f"{policy} keep={keep}"]) for keep in BUDGETS for policy in names]


def rows_of_compat(measured: dict[str, Any]) -> list[Row]:
    names = ["untrimmed", *[name for name in measured if name.startswith("without ")]]
    return [Row.of_heldout(name, measured[name]) for name in names]


def rows_of_kv_dtypes(result: dict[str, Any]) -> list[list[str]]:
    rows = [["", "cache", "right", "right, read", "unchanged"]]
    for row in result["summary"]:
        overall, read = row["overall"], row["kinds"]["read"]
        shares = overall["cache_fraction"], *(one["accuracy"]["mean"] for one in (overall, read))
        shares = *shares, overall["unchanged"]["mean"]
        rows.append([row["group"], *(f"{100 * share:.1f}" for share in shares)])
    return rows


def _table(rows: list[Row], with_kept: bool) -> str:
    header = ["", *(["kept"] if with_kept else []), "lookups", "count", "read", "all questions"]
    return _lines([header, *[row.cells(with_kept) for row in rows]])


def _lines(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def part_of_analysis(found: dict[str, Any]) -> str:
    measured = [table for table in analysis_page.tables(found) if not table.title.startswith("KV bytes")]
    computed = [
        table for shape in SHAPES.values() for table in analysis_page.tables({"memory": kv_table.compute(shape)})
    ]
    overlap, union = found["agreement"]["overlap"]["0.1"], found["first_layer"][0]
    pairs = [overlap[a][b] for a in range(len(overlap)) for b in range(a)]
    return _ANALYSIS.format(
        count=found["dataset"]["questions"],
        analysis=ANALYSIS,
        measured="\n\n".join(_section("###", table) for table in measured),
        half=f"{100 * max(one['together']['0.5'] for one in found['sparsity']):.0f}",
        ninety=pages.span(one["together"]["0.9"] for one in found["sparsity"]),
        shared=pages.span(pairs),
        chance=f"{100 * found['agreement']['chance']['0.1']:.0f}",
        held=pages.span(one["held"] for one in union["later"]),
        kept=f"{100 * union['kept']:.0f}",
        most=pages.span(one["most"] for one in union["later"]),
        computed="\n\n".join(_section("###", table) for table in computed),
    )


def _section(marks: str, table: Table) -> str:
    return "\n".join([f"{marks} {table.title}", "", *table.markdown(), "", textwrap.fill(table.note, 118)])


def written(name: str) -> str:
    """The page with the measured numbers in it."""
    report = json.loads(pages.text(HELDOUT))
    facts = {
        "count": sum(report["questions"].values()),
        "heldout": HELDOUT,
        "sweep": SWEEP,
        "comparison": policies.RESULTS[0],
    }
    if name == "README.md":
        others = "[two more training runs](docs/evaluation.md#in-more-than-one-training-run)"
        part = _README.format(others=others, rows=rows_of_the_readme(report["results"]))
    elif name == "docs/index.md":
        part = gains.part()
    elif name == "docs/evaluation.md":
        part = policies.written()
    elif name == "docs/calibration.md":
        part = calibration.part()
    elif name == "docs/analysis.md":
        part = part_of_analysis(json.loads(pages.text(ANALYSIS)))
    elif name == "docs/performance.md":
        kv = json.loads(pages.text(KV_DTYPES))
        count, table = kv["dataset"]["questions"], _lines(rows_of_kv_dtypes(kv))
        part = _KV_DTYPES.format(count=count, kv_dtypes=KV_DTYPES, table=table)
    elif name == "docs/scaling.md":
        part = capacity.part()
    elif name == "docs/method.md":
        return _put(pages.text(name), "rules", rules.tried())
    else:
        part = _COMPAT.format(table=_table(rows_of_compat(report["results"]), with_kept=False), **facts)
    text = _put(pages.text(name), "results", part)
    if name == "docs/performance.md":
        text = _put(text, "suites", bench.part(bench.committed()))
    if name == "docs/analysis.md":
        text = _put(text, "layers", rules.layers())
    if name == "docs/calibration.md":
        text = _put(_put(text, "per request", per_request.part()), "escalation", escalation.part())
    if name == "docs/evaluation.md":
        accuracy = _ACCURACY.format(table=_table(rows_of_accuracy(report["results"]), with_kept=True), **facts)
        parts = {"accuracy": accuracy, "siblings": siblings.runs(), "k": siblings.axis()}
        for mark, other in {**parts, "merging": merging.part(), "unseen": unseen.part()}.items():
            text = _put(text, mark, other)
        text = _put(text, "quantised", quantised.part())
    return text


def _put(text: str, mark: str, part: str) -> str:
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = text.partition(begin)
    assert end in rest, f"the page has no place for {mark}"
    return f"{before}{begin}\n{part}{end}{rest.partition(end)[2]}"


def main() -> None:
    """Write the pages."""
    for name in PAGES:
        (pages.ROOT / name).write_text(written(name), encoding="utf-8")


if __name__ == "__main__":
    main()
