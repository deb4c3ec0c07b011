"""README's "Install" and first example, as written, in an empty environment: `python -m tests.support.docs.install`.

Only torch is there beforehand, in the build of `constraints.txt`, so that no CUDA is downloaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.support.docs.pages import ROOT, text


def block(page: str, heading: str, language: str) -> str:
    """The first block of code below a heading."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    if found is None:
        raise SystemExit(f"README has no {language} block below {heading!r}")
    return found[1]


def main() -> None:
    """Install, run the commands, run the example; any failure ends with its code."""
    torch = os.environ.get("TORCH") or next(
        line for line in text("constraints.txt").splitlines() if line.startswith("torch==")
    )
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        programs = Path(folder, "bin")
        inside = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": folder}
        inside.pop("PYTHONPATH", None)

        def run(*command: str) -> None:
            subprocess.run(command, env=inside, cwd=ROOT, check=True)

        try:
            run(str(programs / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check", torch)
            readme = text("README.md")
            run("bash", "-euxc", block(readme, "Install", "sh"))
            run(str(programs / "python"), "-I", "-c", block(readme, "Use it", "python"))
            run(str(programs / "python"), "-m", "pip", "list", "--disable-pip-version-check", "--format=freeze")
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)


if __name__ == "__main__":
    main()
