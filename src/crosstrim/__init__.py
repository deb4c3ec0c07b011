"""Training-free trimming of image features in cross-attention vision-language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstrim import compat, errors, mini, policies
    from crosstrim.answering import Answer
    from crosstrim.config import TrimConfig
    from crosstrim.errors import CrosstrimError
    from crosstrim.features import FeatureCache
    from crosstrim.loading import load
    from crosstrim.rating import saliency
    from crosstrim.report import TrimReport
    from crosstrim.selection import select
    from crosstrim.session import Session
    from crosstrim.trimming.handle import TrimHandle, trim

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CrosstrimError",
    "FeatureCache",
    "Session",
    "TrimConfig",
    "TrimHandle",
    "TrimReport",
    "compat",
    "errors",
    "load",
    "mini",
    "policies",
    "saliency",
    "select",
    "trim",
]

_MODULES = {
    "Answer": "answering",
    "CrosstrimError": "errors",
    "FeatureCache": "features",
    "Session": "session",
    "TrimConfig": "config",
    "TrimHandle": "trimming.handle",
    "TrimReport": "report",
    "load": "loading",
    "saliency": "rating",
    "select": "selection",
    "trim": "trimming.handle",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch and transformers take seconds, which `import crosstrim` need not."""
    if name in _MODULES:
        value = getattr(import_module(f"crosstrim.{_MODULES[name]}"), name)
    else:
        try:
            value = import_module(f"crosstrim.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"crosstrim.{name}":
                raise
            raise AttributeError(f"module 'crosstrim' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
