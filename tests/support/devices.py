"""Devices that are not there: tensors that say they lie elsewhere and, as on real devices, refuse to mix.

The arithmetic is the CPU's. An operation on tensors of different devices raises, as torch does, but for what torch
allows: copies, numbers (tensors without dimensions) of the CPU, and indices of the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FIRST, SECOND = torch.device("cpu:1"), torch.device("cpu:2")  # torch itself needs no initialisation for them
_CPU = torch.device("cpu")
_COPIES = ("aten::_to_copy", "aten::copy_")
_INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class Elsewhere(torch.Tensor):
    """A CPU tensor that claims to lie on `device`."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=device
        )

    def __init__(self, inner: torch.Tensor, device: torch.device) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self) -> Any:
        return self.inner.numpy()

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class MadeOfNumbers(TorchFunctionMode):
    """`torch.tensor` writes the numbers down before anything is dispatched, on a CPU without index."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is not torch.tensor or kwargs.get("device") is None:
            return function(*args, **kwargs)
        device = kwargs.pop("device")
        return function(*args, **kwargs).to(device)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Inside, tensors can also be made on pretended devices and moved there."""
    with MadeOfNumbers(), _Operations():
        yield


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = operation._schema.name
    tensors: list[torch.Tensor] = []
    inner_args, inner_kwargs = _mapped(lambda one: tensors.append(one) or _inner(one), (args, kwargs))
    placed = tensors[:1] if name in _INDEXING else tensors
    devices = {one.device for one in placed if one.dim() or one.device != _CPU}
    if name in _INDEXING:
        devices |= {one.device for one in tensors[1:] if one.device != _CPU}
    if len(devices) > 1 and name not in _COPIES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} met {sorted(map(str, devices))}"
        )
    wanted = kwargs.get("device")
    if name == "aten::copy_" or (wanted is None and len(devices) > 1):
        device = tensors[0].device
    else:
        device = torch.device(wanted) if wanted is not None else next(iter(devices), _CPU)
    if wanted is not None:
        inner_kwargs["device"] = _CPU
    result = operation(*inner_args, **inner_kwargs)
    outer = {id(one.inner): one for one in tensors if isinstance(one, Elsewhere)}

    def wrapped(one: torch.Tensor) -> torch.Tensor:
        if id(one) in outer or device == _CPU:
            return outer.get(id(one), one)
        return Elsewhere(one, device)

    return _mapped(wrapped, result)


def _mapped(change: Any, value: Any) -> Any:
    """The value with its tensors changed, in lists, tuples and dictionaries; quicker than torch's general trees."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, one) for one in value])
    if isinstance(value, dict):
        return {name: _mapped(change, one) for name, one in value.items()}
    return value


def _inner(one: torch.Tensor) -> torch.Tensor:
    return one.inner if isinstance(one, Elsewhere) else one


def place(module: nn.Module, device: torch.device) -> None:
    """Put a module on a pretended device as accelerate's `dispatch_model` puts one on a real device."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(Elsewhere(parameter.detach(), device), requires_grad=False)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = Elsewhere(buffer, device)
    add_hook_to_module(module, AlignDevicesHook(execution_device=device))
