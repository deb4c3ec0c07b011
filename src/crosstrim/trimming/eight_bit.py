"""A cache layer that holds its keys and values in eight bits and hands them out in the model's dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch

from crosstrim.method.quantisation import Quantised
from crosstrim.models.names import DynamicLayer


class EightBitLayer(DynamicLayer):  # type: ignore[misc]
    """What `pack` found is quantised; what was written since is as it was written.

    `keys` and `values` read as the model's attention does: a copy, made anew each time and held by nobody.
    Packing twice changes nothing, because only what was appended since is quantised.
    """

    kv_dtype: str

    def __init__(self) -> None:
        self._packed: dict[str, Quantised] = {}
        self._written: dict[str, torch.Tensor] = {}
        self._dtype = torch.get_default_dtype()
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, H, N, D]; None in an empty layer."""
        return self._read("keys")

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._write("keys", tensor)

    @property
    def values(self) -> torch.Tensor | None:
        """[B, H, N, D]; None in an empty layer."""
        return self._read("values")

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._write("values", tensor)

    def pack(self) -> None:
        """Quantise what was written since the last time, which begins with what was packed then."""
        for name, tensor in self._written.items():
            packed = self._packed.get(name)
            newer = Quantised.of(tensor[:, :, packed.codes.shape[2] if packed else 0 :], self.kv_dtype)
            self._packed[name] = packed.followed_by(newer) if packed else newer
        self._written = {}

    def held(self) -> list[torch.Tensor]:
        """The tensors that take the memory."""
        packed = [one for name, one in self._packed.items() if name not in self._written]
        return [*self._written.values(), *(tensor for one in packed for tensor in (one.codes, one.scales))]

    def get_seq_length(self) -> int:
        """Features held, without widening them."""
        held = self._written.get("keys")
        if held is None and "keys" in self._packed:
            held = self._packed["keys"].codes
        return 0 if held is None or held.numel() == 0 else held.shape[-2]

    def offload(self) -> None:
        """Move to the CPU."""
        self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the layer's device."""
        if self.is_initialized:
            self._change(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these samples."""
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def _read(self, name: str) -> torch.Tensor | None:
        if name in self._written or name not in self._packed:
            return self._written.get(name)
        return self._packed[name].to_dtype(self._dtype)

    def _write(self, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None:
            self._packed.pop(name, None)
            self._written.pop(name, None)
        else:
            self._written[name], self._dtype = tensor, tensor.dtype

    def _change(self, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._packed = {name: one.change(how) for name, one in self._packed.items()}
        self._written = {name: how(tensor) for name, tensor in self._written.items()}
