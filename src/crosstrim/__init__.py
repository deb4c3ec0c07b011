"""Training-free trimming of image features in cross-attention vision-language models."""

from crosstrim import compat, errors, mini, policies
from crosstrim.answering import Answer
from crosstrim.config import TrimConfig
from crosstrim.errors import CrosstrimError
from crosstrim.features import FeatureCache
from crosstrim.hooks import TrimHandle, trim
from crosstrim.loading import load
from crosstrim.report import TrimReport
from crosstrim.saliency import saliency
from crosstrim.selection import select
from crosstrim.session import Session

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
