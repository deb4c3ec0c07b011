"""Names of transformers that differ between its versions, found out from the installed code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from crosstrim.errors import IncompatibleTransformersError

_CACHE_NAMES = ("cache", "past_key_values")
"""What Mllama's forwards have called the KV cache, the newest name first."""


@lru_cache(maxsize=1)
def cache_keyword() -> str:
    """What the installed Mllama calls the KV cache in every one of its forwards.

    Raises:
        IncompatibleTransformersError: it takes none of the names known here.
    """
    from transformers.models.mllama import modeling_mllama

    accepted = inspect.signature(modeling_mllama.MllamaModel.forward).parameters
    known = [name for name in _CACHE_NAMES if name in accepted]
    if not known:
        raise incompatible(f"MllamaModel.forward takes the KV cache by none of {', '.join(_CACHE_NAMES)}")
    return known[0]


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the keyword arguments of a forward, under whichever name it accepts; None without one.

    A version that has renamed it still takes the older name, and says so.
    """
    accepted = _CACHE_NAMES[_CACHE_NAMES.index(cache_keyword()) :]
    return next((arguments[name] for name in accepted if arguments.get(name) is not None), None)


def incompatible(what: str) -> IncompatibleTransformersError:
    """The error that says what of the installed transformers does not fit."""
    import transformers

    return IncompatibleTransformersError(
        f"transformers {transformers.__version__} cannot be trimmed: {what}. Install another version "
        '(pip install "transformers>=5.17,<=5.24"), or a newer crosstrim.'
    )
