"""What a person waits for: help, the version and the list of examples need neither torch nor transformers."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from tests.support.docs import help_pages

HEAVY = ("torch", "transformers", "numpy", "PIL", "matplotlib")

IMPORTED = f"""
import sys
from crosstrim.cli import main
try:
    main()
finally:
    print(*sorted({set(HEAVY)} & set(sys.modules)), file=sys.stderr)
"""


HELP = [["--help"], *([verb, "--help"] for verb in help_pages.VERBS if verb)]


@pytest.mark.parametrize(
    "arguments", [*HELP, ["--version"], ["examples"], ["examples", "--json"], ["ask"], ["--unknown"]], ids=" ".join
)
def test_what_runs_no_model_imports_nothing_heavy(arguments):
    result = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == (2 if arguments in (["ask"], ["--unknown"]) else 0)
    assert result.stderr.splitlines()[-1] == ""


def test_the_version_takes_little_more_than_python_itself():
    plain = min(cpu_seconds("-c", "pass") for _ in range(3))
    assert min(cpu_seconds("-m", "crosstrim", "--version") for _ in range(3)) <= 15 * plain


def cpu_seconds(*arguments: str) -> float:
    """What the interpreter takes of a processor, in its own and in the system's name."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=120, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
