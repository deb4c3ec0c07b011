"""Names of transformers that differ between its versions, found out from the installed code."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from logging import ERROR, getLogger
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from crosstrim.errors import IncompatibleTransformersError

__all__ = [
    "Cache",
    "DynamicLayer",
    "StaticLayer",
    "cache_in",
    "cache_keyword",
    "cache_names",
    "incompatible",
    "silent_transformers",
    "transformers_version",
]

_CACHE_NAMES = ("cache", "past_key_values")
"""What Mllama's forwards have called the KV cache, the newest name first."""


_TORCHAO_LOGS = ("torchao", "torch.utils._pytree")


@lru_cache(maxsize=1)
def cache_names() -> tuple[str, ...]:
    """What every forward of the installed Mllama lets the KV cache be called, its own name first.

    A version that has renamed it still takes the older name, and says so.

    Raises:
        IncompatibleTransformersError: it takes none of the names known here.
    """
    from transformers.models.mllama import modeling_mllama

    accepted = inspect.signature(modeling_mllama.MllamaModel.forward).parameters
    known = [place for place, name in enumerate(_CACHE_NAMES) if name in accepted]
    if not known:
        raise incompatible(f"MllamaModel.forward takes the KV cache by none of {', '.join(_CACHE_NAMES)}")
    return _CACHE_NAMES[known[0] :]


def cache_keyword() -> str:
    """What the installed Mllama calls the KV cache.

    Raises:
        IncompatibleTransformersError: as `cache_names`.
    """
    return cache_names()[0]


def cache_in(arguments: Mapping[str, Any], accepted: tuple[str, ...]) -> Any:
    """The KV cache among the keyword arguments of a forward; None without one. Compiled code can follow it.

    Args:
        arguments: of the forward.
        accepted: `cache_names()`, which compiled code cannot ask for.
    """
    for name in accepted:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """Inside, transformers logs errors alone, unless TRANSFORMERS_VERBOSITY asks for more, and shows no progress.

    So does torchao, which transformers imports wherever it is installed, and which complains of every kernel that is
    not for this machine.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
        for name in _TORCHAO_LOGS:
            getLogger(name).setLevel(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def transformers_version() -> str:
    """Of the installed transformers."""
    import transformers

    return str(transformers.__version__)


def incompatible(what: str) -> IncompatibleTransformersError:
    """The error that says what of the installed transformers does not fit."""
    return IncompatibleTransformersError(
        f"transformers {transformers_version()} cannot be trimmed: {what}. Install another version "
        '(pip install "transformers>=5.17,<=5.24"), or a newer crosstrim.'
    )
