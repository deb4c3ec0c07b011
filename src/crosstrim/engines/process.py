"""An engine's own server: the command that starts it trimmed, and how to become it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NoReturn

from crosstrim import mini
from crosstrim.config import TrimConfig
from crosstrim.engines.settings import given
from crosstrim.errors import MissingExtraError


@dataclass(frozen=True)
class Server:
    """How an engine's OpenAI-compatible server is started.

    Attributes:
        engine: its name; its package is called the same, in small letters.
        module: that Python is to run.
        model_option: that names the model.
        ranks_option: that says how many tensor-parallel ranks there are.
        overrides_option: that takes JSON which overrides the model's config.
        check: raises ConfigError for options that the engine cannot have.
        options: what it always needs.
        environment: likewise.
    """

    engine: str
    module: str
    model_option: str
    ranks_option: str
    overrides_option: str
    check: Callable[[Mapping[str, Any]], object]
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(
        self,
        model: str,
        config: TrimConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        tensor_parallel: int = 1,
        options: Sequence[str] = (),
    ) -> tuple[list[str], dict[str, str]]:
        """The command line that starts the server with trimming, and its environment.

        Args:
            model: "mini", a folder, or a Hub id.
            config: what to trim.
            host: to listen on.
            port: to listen on.
            tensor_parallel: ranks to spread the model over.
            options: further options of the engine's server, appended as they are.

        Returns:
            The arguments, the interpreter first, and what to add to the environment.

        Raises:
            ConfigError: the engine cannot have that trimming.
        """
        values = given(config)
        self.check(values)
        arguments = [sys.executable, "-m", self.module]
        arguments += [self.model_option, str(mini.path()) if model == "mini" else model, "--served-model-name", model]
        arguments += ["--host", host, "--port", str(port), self.ranks_option, str(tensor_parallel)]
        arguments += [self.overrides_option, json.dumps({"crosstrim": values}), *self.options]
        arguments += ["--dtype", "float32"] if model == "mini" else []
        return [*arguments, *options], dict(self.environment)

    def serve(self, model: str, config: TrimConfig, **options: Any) -> NoReturn:
        """Print the command and become the server. Takes what `command` takes, and does not return.

        Raises:
            MissingExtraError: the engine is not installed.
            ConfigError: the engine cannot have that trimming.
        """
        self.become(*self.command(model, config, **options))

    def become(self, arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
        """Print a command on stderr, as one would type it, and run it in the place of this process.

        Args:
            arguments: as `command` gives them.
            environment: likewise.

        Raises:
            MissingExtraError: the engine is not installed.
        """
        package = self.engine.lower()
        if find_spec(package) is None:
            raise MissingExtraError(
                f"{self.engine} is not installed in this Python; docs/{package}.md says which version, and how."
            )
        added = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        print(*added, shlex.join(arguments), file=sys.stderr, flush=True)
        os.execve(arguments[0], list(arguments), {**os.environ, **environment})
