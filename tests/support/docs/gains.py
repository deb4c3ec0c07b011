"""What gets faster and what does not: the table of docs/index.md."""

from __future__ import annotations

import json
from typing import Any

from crosstrim import capacity
from crosstrim.bench import bars
from crosstrim.eval import kv_table
from crosstrim.memory import SHAPES, image_kv_bytes
from tests.support.docs import bench, pages, policies

CARD = 48
TEXT_TOKENS = 512

_PART = """\
| what | `keep=0.5` | `keep=0.25` | how we know |
|---|---|---|---|
| Memory: keys and values of one picture, 11B | {half} instead of {whole} | {quarter} | computed: [sizes](method.md#sizes) |
| Requests in flight on one {card} GB card, 11B | {flight_half} instead of {flight_whole} | {flight_quarter} | computed: [scaling](scaling.md#how-many-pictures-fit) |
| Decoding, batch 1: a step in the cross-attention layers | {step_1_half} × the time | {step_1_quarter} × | measured: [three layers of 11B's size on a CPU](performance.md#suite-decode) |
| Decoding, batch 8: the same | {step_8_half} × the time | {step_8_quarter} × | measured: likewise |
| Decoding, whole 11B: bytes read per step at batch 1, 32, 128 | {read} % less | | computed: [what could be saved](performance.md#what-could-be-saved) |
| Time to the first token, mini | **slower**: {first_half} ms instead of {first_whole} ms | {first_quarter} ms | measured: [mini on a CPU](performance.md#suite-mini) |
| Time to the first token, 11B | at most {saved} of about {spent} TFLOP go away | | computed: [sizes](method.md#sizes) |
| Second question about a picture, in a `Session` | {second} × the first one's time to the first token | | measured: [mini on a CPU](performance.md#suite-session) |
| Answers that change, mini | {changed_half} % | at `keep=0.2`: {changed_fifth} % | measured: [2048 held-out questions](evaluation.md#policies-on-mini) |
"""  # noqa: E501 - a row of a table is one line


def part() -> str:
    """The table, from committed results, the shape of 11B, and the page that computes its operations."""
    shape = SHAPES["11b"]
    features = kv_table.tiers(shape)
    kept = {"whole": features["untrimmed"], "half": features["keep=0.5"], "quarter": features["keep=0.25"]}
    facts: dict[str, Any] = {name: f"{image_kv_bytes(shape, count) / 2**20:.0f} MiB" for name, count in kept.items()}
    weights = capacity.weight_bytes_per_card(shape, capacity.VISION_PARAMETERS["11b"], cards=1)
    for name, count in kept.items():
        fit = capacity.requests_in_flight(shape, weights, CARD * 10**9, 1, count, TEXT_TOKENS)
        facts[f"flight_{name}"] = fit
    return _PART.format(card=CARD, **facts, **_times(), **_operations(), **_answers())


def _times() -> dict[str, str]:
    found = {name: result["rows"] for name, result in bench.committed().items()}
    steps = {
        f"step_{batch}_{name}": f"{bars.only(found['decode'], 'ratio', batch=batch, way='crosstrim', kept=kept):.2f}"
        for batch in (1, 8)
        for name, kept in (("half", 0.5), ("quarter", 0.25))
    }
    firsts = {
        f"first_{name}": f"{bars.only(found['mini'], 'first_token_ms', batch=1, way=way, trim=trim):.0f}"
        for name, way, trim in (
            ("whole", "untrimmed", ""),
            ("half", "crosstrim", "keep=0.5"),
            ("quarter", "crosstrim", "keep=0.25"),
        )
    }
    second = bars.only(found["session"], "ratio", way="session", question="second")
    return {**steps, **firsts, "second": f"{second:.2f}"}


def _operations() -> dict[str, str]:
    """What another test computes again: bytes read per step, and operations at the prompt."""
    read = [row["half of the features kept"].split()[0] for row in pages.table("docs/performance.md", "batch size")]
    sizes = {row[""]: row["11B"].split()[0] for row in pages.table("docs/method.md", "")}
    saved = float(sizes["K and V projections of one image, all cross-attention layers"])
    tower = float(sizes["vision tower on one image"])
    return {"read": ", ".join(read), "saved": f"{saved:.1f}", "spent": f"{saved + tower:.0f}"}


def _answers() -> dict[str, str]:
    rows = {row["group"]: row for row in json.loads(pages.text(policies.RESULTS[0]))["summary"]}

    def changed(keep: float) -> str:
        return f"{100 * (1 - rows[f'contribution keep={keep}']['overall']['unchanged']['mean']):.1f}"

    return {"changed_half": changed(0.5), "changed_fifth": changed(0.2)}
