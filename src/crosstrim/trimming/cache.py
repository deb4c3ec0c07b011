"""The image features of a KV cache: trimmed once, never cropped, following their batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from crosstrim.errors import UnsupportedCacheError
from crosstrim.models import mllama
from crosstrim.models.names import Cache, DynamicLayer, StaticLayer
from crosstrim.trimming.eight_bit import EightBitLayer
from crosstrim.trimming.kept import Kept, LayersKept


class Switch:
    """Whether a trim is `on` its model; the caches that it filled share it, and so do their copies."""

    on = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        return self


class ImageLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of image features in one cross-attention layer.

    What was kept belongs to the cache and not to any module, so the layers carry it: it dies with the cache, is
    copied with it, and is reordered with it.
    """

    kept: Kept | None = None
    whole = False  # whether it holds every feature all the same, as the first one does on request

    def __init__(self, layer: DynamicLayer | StaticLayer, switch: Switch) -> None:
        super().__init__()
        # A static cache gets its fixed length back once it is known what stays, see `ImageCache.adopt`.
        self.is_compileable, self.switch = layer.is_compileable, switch
        if _holds_any(layer):  # and not only room for them
            self.device = layer.device
            self.keys, self.values = layer.keys, layer.values
            self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, Hkv, K, D]; None in an empty layer.

        Raises:
            UnsupportedCacheError: an untrimmed Mllama reads what a trim, removed since, has left.
        """
        if (
            not self.switch.on
            and not (self.whole or self.kept is None or self.kept.complete)
            and sys._getframe(1).f_globals["__name__"] == mllama.MODELING
        ):
            raise UnsupportedCacheError(
                "this cache was filled by a trim that was removed since, and the untrimmed model cannot read what is "
                "left of the images; let generation end before remove() or the end of the with block, or trim the "
                "model again and go on."
            )
        return self._keys

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._keys = tensor

    def held(self) -> list[torch.Tensor]:
        """The tensors that take the memory."""
        return [self.keys, self.values]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: assisted decoding takes back text tokens, and image features are none."""

    def reset(self) -> None:
        """Forget the features and what was kept of them."""
        self.keys = self.values = self.kept = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._follow(lambda tensor: tensor[beam_idx.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self._follow(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these samples."""
        super().batch_select_indices(indices)
        self._follow(lambda tensor: tensor[indices.to(tensor.device)])

    def _follow(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.kept is not None:
            self.kept = self.kept.batch(change)


class EightBitImageLayer(ImageLayer, EightBitLayer):
    """The same in eight bits per number."""

    _keys = EightBitLayer.keys
    held = EightBitLayer.held


def bucket(length: int, most: int) -> int:
    """The slots that `length` kept features take in a static cache: at most a sixteenth more, and at most `most`.

    Compiled code is made anew for each length, so few different ones are to occur: whole sixteenths of the power of
    two below. Ours.
    """
    step = max(1, (1 << (length.bit_length() - 1)) // 16)
    return min(-(-length // step) * step, most)


class ImageCache:
    """The cross-attention layers of a KV cache, leader first, as a trim with this switch and `kv_dtype` has them."""

    def __init__(self, cache: Cache, indices: tuple[int, ...], switch: Switch, kv_dtype: str | None) -> None:
        self._layers: list[Any] = cache.layers
        self._cache, self._indices, self._switch, self._kv_dtype = cache, indices, switch, kv_dtype
        self._filled_up: dict[int, Kept] = {}  # layers that share what was kept go on sharing it

    def check(self) -> None:
        """Refuse a cache whose image features could not be trimmed, before anything is written to it."""
        name, template = type(self._cache).__name__, getattr(self._cache, "layer_class_to_replicate", None)
        for index in self._indices:
            kind = type(self._layers[index]) if index < len(self._layers) else template or DynamicLayer
            if kind is StaticLayer and self._kv_dtype is not None:
                raise UnsupportedCacheError(
                    f"kv_dtype={self._kv_dtype!r} packs what is kept, and a {name} of fixed length is read by "
                    "compiled code as it lies; leave kv_dtype or cache_implementation unset."
                )
            if kind not in (DynamicLayer, ImageLayer, EightBitImageLayer, StaticLayer):
                raise UnsupportedCacheError(
                    f"{name} keeps the image features of layer {index} in a {kind.__name__}, whose content is "
                    "packed; crosstrim trims a DynamicCache or a StaticCache. Leave cache_implementation unset, or "
                    '"offloaded" or "static".'
                )

    @property
    def kept(self) -> LayersKept | None:
        """What the layers were trimmed to, if all were trimmed alike; None where they hold no trimmed features."""
        found, lengths = [], set()
        for index in self._indices:
            layer = self._layers[index] if index < len(self._layers) else None
            if isinstance(layer, ImageLayer) and layer.kept is not None:
                found.append(layer.kept)
                lengths.add(layer.kept.kept.shape[1])
        if found and (len(found) < len(self._indices) or len(lengths) > 1):
            raise UnsupportedCacheError(
                "an earlier pass on this cache ended before all layers had cached their image features; start with "
                "an empty cache."
            )
        return tuple(found) or None

    @property
    def holds_features(self) -> bool:
        """Whether the leader's layer has cached any image feature, trimmed or not."""
        index = self._indices[0]
        return index < len(self._layers) and _holds_any(self._layers[index])

    def hand_over(self) -> None:
        """Let this trim be the one that reads the layers from now on."""
        for index in self._indices:
            self._layers[index].switch = self._switch

    def let_grow(self) -> None:
        """Let go of the length for all features that a static cache gives its layers."""
        for index in self._indices:
            if index < len(self._layers) and isinstance(self._layers[index], StaticLayer):
                self._layers[index] = ImageLayer(self._layers[index], self._switch)

    def shrink(self, place: int, newest: Kept, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Leave in a layer what stays of the newest features, which come last in these [B, Hkv, N, D].

        They are those that the layer holds, but an offloaded layer's are still on their device.
        """
        layer = self._layers[self._indices[place]]
        layer.keys, layer.values = (_shrunk(one, newest).to(layer.keys.device) for one in (keys, values))

    def adopt(self, place: int, kept: Kept, whole: bool) -> None:
        """Let a layer carry what was kept of the whole conversation, once it holds no more than that.

        With `whole` it holds every feature all the same. A layer that was adopted before stays of its kind. In a
        static cache it gets a fixed length again, in which the slots that are added hold zeros, and are hidden.
        """
        index = self._indices[place]
        layer: Any = self._layers[index]
        if not isinstance(layer, ImageLayer):
            kind = EightBitImageLayer if self._kv_dtype else ImageLayer
            layer = self._layers[index] = kind(layer, self._switch)
            layer.kv_dtype = self._kv_dtype
        layer.kept, layer.switch, layer.whole = kept, self._switch, whole
        if isinstance(layer, EightBitImageLayer):
            layer.pack()
        if not layer.is_compileable or whole:
            return
        length = bucket(kept.length, kept.feature_count)
        kept = layer.kept = self._filled_up.setdefault(id(kept), kept.padded(length))
        missing = (0, 0, 0, length - layer.keys.shape[2])
        layer.keys, layer.values = pad(layer.keys, missing), pad(layer.values, missing)
        read = [layer.keys, layer.values, kept.slots, kept.occupied, *([kept.groups.sizes] if kept.groups else [])]
        for tensor in read:
            # Else a CUDA graph copies them at every step. Unguarded, so that the next request compiles nothing.
            torch._dynamo.mark_static_address(tensor, guard=False)

    @property
    def outcome(self) -> tuple[LayersKept, int, int] | None:
        """What was kept, the bytes of the keys and values that the layers really hold, and untrimmed would hold."""
        kept = self.kept
        if kept is None:
            return None
        layers = [self._layers[index] for index in self._indices]
        # Not nbytes, which compiled code cannot ask where sizes are symbols.
        held = sum(one.numel() * one.element_size() for layer in layers for one in layer.held())
        wide = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        feature = sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in wide)
        return kept, held, feature * kept[0].kept.numel()


def reads(cache: Any, indices: tuple[int, ...]) -> list[Kept | None]:
    """What layers were trimmed to; None where one holds every feature. Compiled code can follow it."""
    layers = [None if cache is None else cache.layers[index] for index in indices]
    return [layer.kept if isinstance(layer, ImageLayer) and not layer.whole else None for layer in layers]


def _shrunk(tensor: torch.Tensor, newest: Kept) -> torch.Tensor:
    """[B, Hkv, N, D] without what was dropped of the newest features, those that `newest` speaks of."""
    slots = newest.slots.to(tensor.device)[:, None, :, None]
    older, newer = tensor.split([tensor.shape[2] - newest.feature_count, newest.feature_count], dim=2)
    stays = newer.gather(2, slots.expand(-1, newer.shape[1], -1, newer.shape[3]))
    return torch.cat([older, stays], dim=2) if older.shape[2] else stays


def _holds_any(layer: Any) -> bool:
    if not layer.is_initialized or layer.keys.numel() == 0:
        return False
    return not isinstance(layer, StaticLayer) or int(layer.get_seq_length()) > 0  # else it was reset
