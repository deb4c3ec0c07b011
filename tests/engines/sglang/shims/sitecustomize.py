"""Python runs this first in every process that has this folder on PYTHONPATH, SGLang's workers included.

torchvision's compiled operators are built for another torch than the CPU one. SGLang imports torchvision all the
same, which fails unless somebody declares the operators. Nothing here implements them.
"""

from __future__ import annotations

import contextlib

_OPERATORS = """\
nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
"""

_VISION = None

with contextlib.suppress(ImportError):  # pip runs without torch
    import torch

    _VISION = torch.library.Library("torchvision", "DEF")  # lives as long as its declarations
    for _operator in _OPERATORS.splitlines():
        _VISION.define(_operator)
