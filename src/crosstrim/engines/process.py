"""Start an engine's own server in the place of this process."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import NoReturn

from crosstrim.errors import MissingExtraError


def become(engine: str, arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Print a command on stderr, as one would type it, and run it in the place of this process.

    Args:
        engine: its name; its package is called the same, in small letters.
        arguments: the command, the interpreter's path first.
        environment: what it needs beside the environment of this process.

    Raises:
        MissingExtraError: the engine is not installed.
    """
    package = engine.lower()
    if find_spec(package) is None:
        raise MissingExtraError(
            f"{engine} is not installed in this Python; docs/{package}.md says which version, and how."
        )
    added = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    print(*added, shlex.join(arguments), file=sys.stderr, flush=True)
    os.execve(arguments[0], list(arguments), {**os.environ, **environment})
