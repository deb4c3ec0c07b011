"""Training-free trimming of image features in cross-attention vision-language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstrim import errors, mini
    from crosstrim.asking.answering import Answer
    from crosstrim.asking.features import FeatureCache
    from crosstrim.asking.loading import load
    from crosstrim.asking.session import Session
    from crosstrim.config import TrimConfig
    from crosstrim.errors import CrosstrimError
    from crosstrim.eval.calibrate import calibrate
    from crosstrim.method import policies
    from crosstrim.method.saliency import saliency
    from crosstrim.method.selection import select
    from crosstrim.models import compat
    from crosstrim.trimming.handle import TrimHandle, trim
    from crosstrim.trimming.report import TrimReport

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CrosstrimError",
    "FeatureCache",
    "Session",
    "TrimConfig",
    "TrimHandle",
    "TrimReport",
    "calibrate",
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
    "Answer": "asking.answering",
    "CrosstrimError": "errors",
    "FeatureCache": "asking.features",
    "Session": "asking.session",
    "TrimConfig": "config",
    "TrimHandle": "trimming.handle",
    "TrimReport": "trimming.report",
    "calibrate": "eval.calibrate",
    "load": "asking.loading",
    "saliency": "method.saliency",
    "select": "method.selection",
    "trim": "trimming.handle",
}
"""Where each public name is."""

_SUBMODULES = {"compat": "models.compat", "policies": "method.policies"}
"""Public modules that lie in a room of their own."""


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch and transformers take seconds, which `import crosstrim` need not."""
    if name in _MODULES:
        value = getattr(import_module(f"crosstrim.{_MODULES[name]}"), name)
    else:
        try:
            value = import_module(f"crosstrim.{_SUBMODULES.get(name, name)}")
        except ModuleNotFoundError as error:
            if error.name != f"crosstrim.{name}":
                raise
            raise AttributeError(f"module 'crosstrim' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
