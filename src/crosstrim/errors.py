"""The errors and warnings crosstrim raises, all children of `CrosstrimError` or `CrosstrimWarning`."""

from __future__ import annotations

from typing import Any


class CrosstrimError(Exception):
    """Anything crosstrim refuses; the message names the value met, the limit and the remedy."""


class ConfigError(CrosstrimError, ValueError):
    """A trimming option is out of range, unknown, or contradicts another."""


class UnsupportedModelError(CrosstrimError, TypeError):
    """The model has no cross-attention layers that crosstrim knows."""


class IncompatibleTransformersError(CrosstrimError, RuntimeError):
    """The installed transformers lacks something that trimming needs, so that nothing would be trimmed."""


class NotTrimmedError(CrosstrimError, RuntimeError):
    """A trimmed model ran past its trim, so that its answer would be another's."""


class UnsupportedCacheError(CrosstrimError, TypeError):
    """The KV cache is of a kind whose cross-attention layers cannot be trimmed."""


class AlreadyTrimmedError(CrosstrimError, RuntimeError):
    """The model carries a trim already.

    Attributes:
        handle: of that trim, to `remove()` it.
    """

    def __init__(self, message: str, handle: Any = None) -> None:
        super().__init__(message)
        self.handle = handle


class InputError(CrosstrimError, ValueError):
    """A tensor, an image or a prompt has a shape, dtype or content that cannot be used."""


class ContextLengthError(InputError):
    """A prompt and its answer are more than the model reads."""


class LoadError(CrosstrimError, OSError):
    """A model, a processor or a file could not be loaded."""


class DeviceError(CrosstrimError, RuntimeError):
    """What was asked for needs a device that is not there."""


class DatasetError(CrosstrimError, ValueError):
    """A file of questions cannot be read, or has rows that cannot be asked."""


class ResultError(CrosstrimError, OSError):
    """A result or the journal of a run cannot be read, written, or continued with what was given."""


class UnwritableError(ResultError):
    """A result or a journal cannot be written, as on a full disk; what was written of it before is kept."""


class CalibrationError(CrosstrimError, ValueError):
    """The questions support no budget at the wanted risk, or a calibration is used with what it was not made with."""


class EngineError(CrosstrimError, RuntimeError):
    """Something that runs the model for others, a Ray cluster, SGLang or vLLM, is set up wrongly or gave up."""


class MissingExtraError(CrosstrimError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class CrosstrimWarning(UserWarning):
    """Base of every warning crosstrim emits."""


class CompatWarning(CrosstrimWarning):
    """The installed transformers departs from Meta's reference and the model was not repaired."""
