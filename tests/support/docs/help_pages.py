"""Writes the help of every verb into docs/cli.md: `python -m tests.support.docs.help_pages`."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from crosstrim.cli.program import app

PAGE = Path(__file__).parents[3] / "docs" / "cli.md"
VERBS = ("", "ask", "examples", "eval", "calibrate", "analyze", "bench", "batch", "serve", "play", "doctor")
MARK = "<!-- What follows is written by `python -m tests.support.docs.help_pages`. -->\n"


def help_of(verb: str) -> str:
    """What `crosstrim VERB --help` prints, eighty columns wide and without colours."""
    # The page must not depend on who writes it: not on their terminal, nor on their default model.
    settings = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "TERM": "dumb", "CROSSTRIM_MODEL": None}
    printed = CliRunner().invoke(app, [*verb.split(), "--help"], env=settings, prog_name="crosstrim").stdout
    return re.sub(r" +$", "", printed, flags=re.MULTILINE).strip()


def generated() -> str:
    """The part of the page below the mark."""
    sections = [f"## crosstrim {verb}".rstrip() + f"\n\n```text\n{help_of(verb)}\n```\n" for verb in VERBS]
    return "\n" + "\n".join(sections)


if __name__ == "__main__":
    by_hand = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(by_hand + MARK + generated(), encoding="utf-8")
