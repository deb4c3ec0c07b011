"""A device for machines that have none: it computes on the CPU, and counts what makes the host wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("mps")
"""What it is called: torch's builds for CPUs take this name without asking whether there is one."""

_CPU = torch.device("cpu")
_LOOKS = {"item", "_local_scalar_dense", "is_nonzero", "equal", "allclose"}
_LOOKS |= {"nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class There(torch.Tensor):
    """A tensor on the device.

    Attributes:
        values: what it holds, for operators alone.
    """

    values: torch.Tensor
    looks: list[str]
    device = property(lambda self: DEVICE)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, looks: list[str]) -> There:
        shape = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        # torch's own code for the device "meta" is what never touches memory; it guards no device either.
        one = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="meta", **shape)
        one.values, one.looks = values, looks
        return one

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} met a tensor of the device outside of its block")

    def tolist(self) -> Any:
        """torch's own copies without an operator, and refuses subclasses."""
        self.looks.append("tolist")
        return self.values.tolist()


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.looks: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device") or next((one for one in args if isinstance(one, torch.device)), None)
        if target is not None and target.type == "meta":  # what torch's own code takes from a tensor there
            target = DEVICE
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        there = [one for one in tensors if isinstance(one, There)]
        name = function.overloadpacket.__name__
        if there:
            self._look(name, args, target, tensors)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": target and _CPU}
        args = [_CPU if isinstance(one, torch.device) else one for one in args]
        inner_args, inner = tree_map(lambda one: one.values if isinstance(one, There) else one, (args, kwargs))
        result = function(*inner_args, **inner)
        if not (there if target is None else target == DEVICE):
            return result
        known = {id(one.values): one for one in there}  # what is changed in place stays the tensor that it is

        def placed(one: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            return known[id(one)] if id(one) in known else There(one, self.looks)

        return tree_map(placed, result)

    def _look(self, name: str, args: Any, target: torch.device | None, tensors: list[torch.Tensor]) -> None:
        """Note it, if the operator on these tensors looks at one on the device."""
        by_mask = name in _INDEXING and any(one is not None and one.dtype == torch.bool for one in args[1])
        leaves = target == _CPU or (name == "copy_" and not isinstance(args[0], There))
        if name in _LOOKS or by_mask or leaves or (name == "where" and len(args) == 1):
            self.looks.append(name)
        elif target is None and name != "copy_":
            strangers = [one for one in tensors if not isinstance(one, There) and one.dim()]
            assert not strangers, f"{name} met tensors of two devices"


@contextmanager
def device() -> Iterator[list[str]]:
    """In the block there is a device `DEVICE`; yields the names of the operators by which the host looked at it."""
    operators = _Operators()
    with torch.inference_mode(), operators:
        yield operators.looks
