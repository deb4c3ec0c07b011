"""The pages people read, and their parts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from crosstrim.data.pages import Table

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(markdown: str) -> str:
    return re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)


def snippets(name: str, language: str = "python") -> list[tuple[int, str]]:
    """Every code block of that language: its first line's number, its code."""
    markdown = text(name)
    found = re.finditer(rf"^```{language}\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)
    return [(markdown[: one.start(1)].count("\n") + 1, one[1]) for one in found]


def tables(name: str) -> list[list[list[str]]]:
    """Every table as rows of cells, its header first and without the line of dashes."""
    found, rows = [], []
    for line in [*without_code(text(name)).splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                rows.append(cells)
        elif rows:
            found.append(rows)
            rows = []
    return found


def table(name: str, first_header: str) -> list[dict[str, str]]:
    """The one table of the page whose first header is this, one dictionary per row."""
    matching = [rows for rows in tables(name) if rows[0][0] == first_header]
    assert len(matching) == 1, f"{name} has {len(matching)} tables that begin with {first_header!r}"
    header, *rows = matching[0]
    return [dict(zip(header, row, strict=True)) for row in rows]


def markdown(header: Iterable[str], lines: Iterable[tuple[str, ...]]) -> str:
    """A table without a title."""
    return "\n".join(Table("", tuple(header), tuple(lines), "").markdown())


def span(shares: Iterable[float]) -> str:
    """The least and the most of them, in per cent."""
    low, *_, high = sorted(shares)
    return f"{100 * low:.0f} to {100 * high:.0f}"


def anchors(name: str) -> set[str]:
    """What links into the page may point at: headings, by GitHub's rule, and names that the site documents there."""
    documented = re.findall(r"^::: (\S+)$", text(name), flags=re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", without_code(text(name)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings} | {
        *documented
    }
