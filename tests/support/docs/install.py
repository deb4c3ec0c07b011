"""The built wheel in an empty environment, far from the repository: `python -m tests.support.docs.install`.

README's commands and its example run there as written, and a typed program that uses crosstrim is checked. Only torch
is there beforehand, that of the environment in which this runs, so that no CUDA is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

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


def link(name: str, site: Path, linked: set[str]) -> None:
    """Put a distribution, and what it requires, into another environment's folder of packages, by hard links."""
    if name in linked or (site / name).is_dir():  # before Python 3.12 setuptools comes with pip
        return
    linked.add(name)
    found, here = distribution(name), Path(sysconfig.get_path("purelib"))
    for file in found.files or ():
        source = Path(found.locate_file(file))
        if source.is_file() and source.is_relative_to(here) and ".." not in file.parts:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
    for requirement in map(Requirement, found.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            link(requirement.name, site, linked)


def main() -> None:
    """Install, run the commands, run the example, check the types; any failure ends with its code."""
    (wheel,) = ROOT.glob("dist/*.whl")
    with tempfile.TemporaryDirectory(dir=Path(sys.prefix)) as folder:
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
        link("torch", Path(sysconfig.get_path("purelib", vars={"base": str(environment)})), set())

        def run(*command: str | Path, **also: str) -> None:
            subprocess.run(list(map(str, command)), env={**inside, **also}, cwd=elsewhere, check=True)

        try:
            readme = text("README.md")
            run("bash", "-euxc", block(readme, "Install", "sh"), PIP_CONSTRAINT=str(constraint), PIP_QUIET="2")
            # -I is deaf to the variable that says where what is compiled is kept, and would compile all anew.
            kept = ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
            run(programs / "python", "-I", *kept, "-c", block(readme, "Use it", "python"))
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
