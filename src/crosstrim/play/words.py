"""What the page says: sentences, and pieces of HTML in which everything that was typed or generated is escaped."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import torch

from crosstrim.errors import CrosstrimError
from crosstrim.method.names import BUDGETED, PAPER, POLICIES
from crosstrim.play.state import KNOBS
from crosstrim.trimming.report import format_bytes
from crosstrim.wording import counted, percent

if TYPE_CHECKING:
    from crosstrim.asking.answering import Answer
    from crosstrim.play.state import Comparison, Point

_KEEP, _K = KNOBS

KNOB_CHOICES = [("keep: exactly this share stays", _KEEP), ("k: each attention head picks this share", _K)]
"""What the two ways to say how much stays are called, and their names."""

_DOES = {
    "contribution": "relevance, less what is said twice (ours)",
    "union": "every attention head picks its own (the paper)",
    "mean": "the heads' average",
    "value": "heads, by what features add to the output",
    "mass": "heads, by the share of attention",
    "mmr": "relevant, and unlike what is kept",
    "dpp": "a varied set",
    "pyramid": "union, and less in every later layer",
    "grid": "spread evenly, a control",
    "random": "drawn blindly, a control",
}

POLICY_CHOICES = [
    (f"automatic: {BUDGETED} or {PAPER}", ""),
    *((f"{name}: {_DOES[name]}", name) for name in sorted(POLICIES, key=list(_DOES).index)),
]
"""What the policies are called, and their names; an empty one is what goes with the knob."""

SAME, CHANGED = "same answer", "answer changed"

WAITING = '<p class="waiting">Pick an example or drop a picture, and ask.</p>'


def sentence(error: Exception) -> str:
    """What a person is told of an error. One that nobody worded is shown in the terminal, and only there."""
    if isinstance(error, CrosstrimError):
        words = " ".join(str(error).split())
    elif isinstance(error, torch.OutOfMemoryError):
        words = "the device ran out of memory; ask about a smaller picture, or start with --dtype bfloat16."
    else:
        traceback.print_exception(error, file=sys.stderr)
        words = "something went wrong; the terminal in which the playground runs says what."
    return words[:1].upper() + words[1:]


def notice(words: str) -> str:
    """A message above everything else; nothing for no words."""
    return f'<p class="notice" role="alert">{escape(words)}</p>' if words else ""


def heading(model: str) -> str:
    """The page's title, and what it is about."""
    return (
        "<h1>crosstrim playground</h1><p>A vision-language model reads a picture as hundreds or thousands of image "
        "features. How few of them does your question need? Grey patches are dropped after the first cross-attention "
        f"layer. Model: <b>{escape(model)}</b></p>"
    )


def comparison(found: Comparison, legend: str) -> str:
    """Both answers side by side, and below them what the trim kept and saved."""
    report, verdict = found.report, SAME if found.same else CHANGED
    facts = [
        ("kept", "Kept", f"{report.kept} of {report.visible}", f"visible features, {_share(found)}"),
        ("kv", "Image KV", format_bytes(report.kv_bytes), f"of {format_bytes(report.kv_bytes_untrimmed)} untrimmed"),
        ("time", "Time", _seconds(found.trimmed), f"untrimmed {found.untrimmed.seconds:.2f} s"),
        ("verdict", "Verdict", verdict, f"policy {report.config.decider}"),
    ]
    answers = "".join(
        f'<section class="answer" id="{title.lower()}"><h3>{title}</h3><p>{_said(answer)}</p></section>'
        for title, answer in (("Trimmed", found.trimmed), ("Untrimmed", found.untrimmed))
    )
    rows = "".join(
        f'<div id="{key}"><dt>{name}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>'
        for key, name, value, note in facts
    )
    width = percent(report.kept_fraction)
    return (
        f'<div class="answers {"same" if found.same else "changed"}" aria-live="polite">{answers}</div>'
        f'<div class="meter" aria-hidden="true"><span style="width:{width}%"></span></div>'
        f'<dl class="facts">{rows}</dl><p class="legend">{escape(legend[:1].upper() + legend[1:])}. '
        "Times are of single runs, without encoding the picture.</p>"
    )


def table(points: Sequence[Point]) -> str:
    """A question's answers over a range of budgets."""
    if not points:
        return ""
    rows = "".join(
        f'<tr class="{"same" if found.same else "changed"}"><th scope="row">{point.per_cent} %</th>'
        f'<td>{found.report.kept}</td><td class="wide">{_share(found)}</td>'
        f'<td class="wide">{format_bytes(found.report.kv_bytes)}</td>'
        f'<td class="said">{_said(found.trimmed)}</td><td>{"same" if found.same else "changed"}</td></tr>'
        for point in points
        for found in [point.comparison]
    )
    titles = (
        '<th scope="col">Budget</th><th scope="col">Kept</th><th scope="col" class="wide">Share</th>'
        '<th scope="col" class="wide">Image KV</th><th scope="col">Answer</th><th scope="col">Verdict</th>'
    )
    untrimmed = points[0].comparison
    return (
        f"<p>Untrimmed: <b>{_said(untrimmed.untrimmed)}</b>, from {untrimmed.report.visible} features and "
        f"{format_bytes(untrimmed.report.kv_bytes_untrimmed)} of image KV.</p>"
        f'<table class="budgets"><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>'
    )


def turn(answer: Answer) -> str:
    """What stands beside an answer of the conversation."""
    assert answer.report is not None
    report = answer.report
    return f"kept {report.kept} of {report.visible} features, {percent(report.kept_fraction)} %"


def _said(answer: Answer) -> str:
    return escape(answer.answer) or "<i>(nothing)</i>"


def _share(found: Comparison) -> str:
    return f"{percent(found.report.kept_fraction)} %"


def _seconds(answer: Answer) -> str:
    return f"{answer.seconds:.2f} s, {counted(answer.tokens, 'token')}"
