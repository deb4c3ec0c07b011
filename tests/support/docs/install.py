"""The built wheel in an empty environment, far from the repository: `python -m tests.support.docs.install`.

README's commands and its example run there as written, and a typed program that uses crosstrim is checked. Only torch
is there beforehand, in the build of `constraints.txt`, so that no CUDA is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.support.docs.pages import ROOT, text

MYPY = """\
[mypy]
[mypy-torch.*,transformers.*]
follow_imports = skip
"""
"""To read these two takes a minute, and pyright does."""

CHECKERS = ROOT / ".venv/bin/mypy", ROOT / ".venv-docs/bin/pyright"


def block(page: str, heading: str, language: str) -> str:
    """The first block of code below a heading."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    if found is None:
        raise SystemExit(f"README has no {language} block below {heading!r}")
    return found[1]


def main() -> None:
    """Install, run the commands, run the example, check the types; any failure ends with its code."""
    torch = os.environ.get("TORCH") or next(
        line for line in text("constraints.txt").splitlines() if line.startswith("torch==")
    )
    (wheel,) = ROOT.glob("dist/*.whl")
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        venv.create(environment, with_pip=True)
        programs, elsewhere = environment / "bin", Path(folder, "elsewhere")
        elsewhere.mkdir()
        # README says `pip install crosstrim`: this makes it the wheel that was built, and not what an index has.
        constraint = Path(folder, "constraint.txt")
        constraint.write_text(f"crosstrim @ {wheel.as_uri()}\n", encoding="utf-8")
        inside = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(environment),
        }
        inside.pop("PYTHONPATH", None)
        install = ("-m", "pip", "install", "-qq", "--disable-pip-version-check", torch)

        def run(*command: str | Path, **also: str) -> None:
            subprocess.run(list(map(str, command)), env={**inside, **also}, cwd=elsewhere, check=True)

        try:
            run(programs / "python", *install)
            readme = text("README.md")
            run("bash", "-euxc", block(readme, "Install", "sh"), PIP_CONSTRAINT=str(constraint), PIP_QUIET="2")
            run(programs / "python", "-I", "-c", block(readme, "Use it", "python"))
            run(programs / "python", "-m", "pip", "list", "--disable-pip-version-check", "--format=freeze")
            shutil.copy(ROOT / "tests/support/consumer.py", elsewhere)
            mypy, pyright = CHECKERS
            Path(elsewhere, "mypy.ini").write_text(MYPY, encoding="utf-8")
            run(mypy, "--strict", "--python-executable", programs / "python", "consumer.py")
            run(pyright, "--pythonpath", programs / "python", "consumer.py")
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)


if __name__ == "__main__":
    main()
