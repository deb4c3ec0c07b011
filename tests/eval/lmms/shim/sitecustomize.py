"""For tests: lets torchvision be imported beside a torch of another build, without its operators.

PyPI's torchvision is built for CUDA. Beside the CPU's torch its library cannot be loaded, and its import then fails
because it describes operators that were never declared. Nothing here computes with them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _loads() -> bool:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return True  # nothing to mend
    try:
        torch.ops.load_library(Path(found.origin).parent / "_C.so")
    except OSError:
        return False
    return True


if not _loads():
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
