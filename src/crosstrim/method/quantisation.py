"""Tensors in eight bits per number, with a scale for every row. Pure tensor code; knows no model. Ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from crosstrim.method.names import KV_DTYPES as KV_DTYPES

_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}


def share_of_bytes(kv_dtype: str | None, row: int, dtype: torch.dtype) -> float:
    """Bytes of rows of `row` numbers held as `kv_dtype`, scale included, as a share of those in `dtype`."""
    return 1.0 if kv_dtype is None else (row + 2) / (row * dtype.itemsize)


@dataclass(frozen=True)
class Quantised:
    """A tensor whose last dimension shares a scale: code x scale is the number.

    Attributes:
        codes: [..., D] int8 or float8_e4m3fn.
        scales: [..., 1] float16.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, kv_dtype: str) -> Quantised:
        """The nearest codes, the largest magnitude of each row at the end of their range.

        int8 is off by at most half a scale; fp8 by a sixteenth of the number, or 2**-10 scales where that is more.
        The rounding of the scale to float16 comes on top, of the order of 2**-11 of a row's largest number.

        Args:
            tensor: [..., D] of a floating dtype.
            kv_dtype: one of `KV_DTYPES`.
        """
        largest = _LARGEST[kv_dtype]
        numbers = tensor.float()
        scales = (numbers.abs().amax(-1, keepdim=True) / largest).to(torch.float16)
        # float16 ends at 6e-8 and 65504: rows beyond lose precision and stay finite.
        scales = scales.clamp(2.0**-24, torch.finfo(torch.float16).max)
        codes = (numbers / scales.float()).clamp(-largest, largest)
        codes = codes.round() if kv_dtype == "int8" else codes
        return cls(codes.to(_CODES[kv_dtype]), scales)

    def to_dtype(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers, [..., D], computed in float32."""
        return (self.codes.float() * self.scales.float()).to(dtype)

    def change(self, how: Callable[[torch.Tensor], torch.Tensor]) -> Quantised:
        """Both tensors after `how` moved them, or picked rows of them."""
        codes = self.codes.view(torch.uint8)  # few operations know float8
        return Quantised(how(codes).view(self.codes.dtype), how(self.scales))

    def followed_by(self, more: Quantised) -> Quantised:
        """Both along the last dimension but one."""
        codes = torch.cat([self.codes.view(torch.uint8), more.codes.view(torch.uint8)], dim=-2)
        return Quantised(codes.view(self.codes.dtype), torch.cat([self.scales, more.scales], dim=-2))
