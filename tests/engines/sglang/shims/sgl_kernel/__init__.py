"""Stands in for sglang-kernel, made for CUDA: SGLang imports its names, and on a CPU never calls them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from typing import Any

_MISSING = "sgl_kernel.scalar_type"  # SGLang has a fallback for this one


def _refuses(name: str) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} of sglang-kernel was called, which this test environment does not have.")

    kernel.__name__ = name
    return kernel


def _getattr(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _refuses(name)


__getattr__ = _getattr


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every submodule importable, with kernels that refuse."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("sgl_kernel.") or name == _MISSING:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: Any) -> None:
        module.__getattr__ = _getattr


sys.meta_path.append(_Submodules())
