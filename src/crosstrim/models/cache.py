"""The cache layer that holds image features: trimmed once, never cropped, following its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from crosstrim.errors import UnsupportedCacheError
from crosstrim.models.eight_bit import EightBitLayer
from crosstrim.state import LayerStates, TrimState


class ImageLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of image features in one cross-attention layer.

    What was kept belongs to the cache and not to any module, so the layers carry it: it dies with the cache, is
    copied with it, and is reordered with it.

    Attributes:
        state: what was kept.
        whole: whether the layer holds every feature all the same, as the first one does on request.
    """

    whole = False

    def __init__(self, layer: DynamicLayer | StaticLayer, state: TrimState | None) -> None:
        super().__init__()
        # A static cache gets its fixed length back once it is known what stays, see `fill_up`.
        self.is_compileable = layer.is_compileable
        self.state = state
        if _holds_any(layer):  # and not only room for them
            self.device = layer.device
            self.keys, self.values = layer.keys, layer.values
            self.is_initialized = True

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: assisted decoding takes back text tokens, and image features are none."""

    def reset(self) -> None:
        """Forget the features and what was kept of them."""
        self.keys = self.values = self.state = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        if self.state is not None:
            self.state = self.state.batch(lambda tensor: tensor[beam_idx.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        if self.state is not None:
            self.state = self.state.batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these samples."""
        super().batch_select_indices(indices)
        if self.state is not None:
            self.state = self.state.batch(lambda tensor: tensor[indices.to(tensor.device)])


class EightBitImageLayer(ImageLayer, EightBitLayer):
    """The same in eight bits per number."""

    def __init__(self, layer: DynamicLayer, state: TrimState | None, kv_dtype: str) -> None:
        super().__init__(layer, state)
        self.kv_dtype = kv_dtype


def check(cache: Cache | None, layer_indices: tuple[int, ...], kv_dtype: str | None) -> None:
    """Refuse a cache whose image features could not be trimmed, before anything is written to it.

    Raises:
        UnsupportedCacheError: a cross-attention layer's cache is packed or otherwise special, static with a
            `kv_dtype`, or holds image features that were cached untrimmed.
    """
    if cache is None:
        return
    for index in layer_indices:
        if index < len(cache.layers):
            layer = cache.layers[index]
            kind = type(layer)
        else:
            layer, kind = None, getattr(cache, "layer_class_to_replicate", None) or DynamicLayer
        if kind is StaticLayer and kv_dtype is not None:
            raise UnsupportedCacheError(
                f"kv_dtype={kv_dtype!r} packs what is kept, and a {type(cache).__name__} of fixed length is read by "
                "compiled code as it lies; leave kv_dtype or cache_implementation unset."
            )
        if kind not in (DynamicLayer, ImageLayer, EightBitImageLayer, StaticLayer):
            raise UnsupportedCacheError(
                f"{type(cache).__name__} keeps the image features of layer {index} in a {kind.__name__}, whose "
                "content is packed; crosstrim trims a DynamicCache or a StaticCache. Leave cache_implementation "
                'unset, or "offloaded" or "static".'
            )


def traced_state(cache: Cache | None, index: int) -> TrimState | None:
    """What layer `index` was trimmed to, asked for in a way that compiled code can follow."""
    layer = None if cache is None else cache.layers[index]
    return layer.state if isinstance(layer, ImageLayer) and not layer.whole else None


def is_whole(cache: Cache, index: int) -> bool:
    """Whether layer `index` of a cache that a trim filled holds every feature."""
    return bool(cache.layers[index].whole)


def states_of(cache: Cache | None, layer_indices: tuple[int, ...]) -> LayerStates | None:
    """What this cache's cross-attention layers were trimmed to; None for a cache that holds no trimmed features."""
    if cache is None or layer_indices[-1] >= len(cache.layers):
        return None
    layers = [cache.layers[index] for index in layer_indices]
    states = tuple(layer.state for layer in layers if isinstance(layer, ImageLayer) and layer.state is not None)
    return states if len(states) == len(layers) else None


def holds_features(cache: Cache | None, leader_index: int) -> bool:
    """Whether the cross-attention layer `leader_index` has cached any image feature."""
    if cache is None or leader_index >= len(cache.layers):
        return False
    return _holds_any(cache.layers[leader_index])


def _holds_any(layer: Any) -> bool:
    if not layer.is_initialized or layer.keys.numel() == 0:
        return False
    return not isinstance(layer, StaticLayer) or int(layer.get_seq_length()) > 0  # else it was reset


def keep_newest(cache: Cache, index: int, state: TrimState) -> None:
    """Shrink the newest features of layer `index`, those that `state` speaks of, to its slots."""
    layer, newest = cache.layers[index], state.feature_count
    slots = state.slots.to(layer.keys.device)[:, None, :, None]

    def shrink(tensor: torch.Tensor) -> torch.Tensor:
        older, newer = tensor.split([tensor.shape[2] - newest, newest], dim=2)
        kept = newer.gather(2, slots.expand(-1, newer.shape[1], -1, newer.shape[3]))
        return torch.cat([older, kept], dim=2) if older.shape[2] else kept

    layer.keys, layer.values = shrink(layer.keys), shrink(layer.values)


def make_growable(cache: Cache | None, layer_indices: tuple[int, ...]) -> None:
    """Let go of the length for all features that a static cache gives its cross-attention layers."""
    if cache is None:
        return
    for index in layer_indices:
        if index < len(cache.layers) and isinstance(cache.layers[index], StaticLayer):
            cache.layers[index] = ImageLayer(cache.layers[index], None)


BUCKETS_PER_IMAGE = 16
"""In a static cache the kept features of a batch take a whole number of sixteenths of an image's features. Ours."""


def fill_up(cache: Cache, layer_indices: tuple[int, ...], features_per_image: int) -> None:
    """Round the length of a static cache's layers up to a bucket, so that few different ones occur.

    Compiled code is made anew for each length. The slots that are added hold zeros, and their state hides them.
    """
    bucket = max(1, features_per_image // BUCKETS_PER_IMAGE)
    states: dict[int, TrimState] = {}
    for index in layer_indices:
        layer = cache.layers[index]
        if not layer.is_compileable:
            continue
        length = -(-layer.state.length // bucket) * bucket
        state = states.setdefault(id(layer.state), layer.state.padded(length))
        missing = (0, 0, 0, length - layer.keys.shape[2])
        layer.keys, layer.values, layer.state = pad(layer.keys, missing), pad(layer.values, missing), state
        for tensor in (layer.keys, layer.values, state.slots, state.occupied):
            # Else a CUDA graph copies them at every step. Unguarded, so that the next request compiles nothing.
            torch._dynamo.mark_static_address(tensor, guard=False)


def adopt(
    cache: Cache, layer_indices: tuple[int, ...], states: LayerStates, kv_dtype: str | None, leader_is_whole: bool
) -> None:
    """Turn the cross-attention layers of `cache` into `ImageLayer`s, each carrying its own of `states`.

    With a `kv_dtype` they hold eight bits per number. A layer that was adopted before stays of its kind.
    """
    for index, state in zip(layer_indices, states, strict=True):
        layer = cache.layers[index]
        if not isinstance(layer, ImageLayer):
            layer = EightBitImageLayer(layer, state, kv_dtype) if kv_dtype else ImageLayer(layer, state)
            cache.layers[index] = layer
        layer.state = state
        if isinstance(layer, EightBitImageLayer):
            layer.pack()
    cache.layers[layer_indices[0]].whole = leader_is_whole


def bytes_of(cache: Cache, layer_indices: tuple[int, ...]) -> int:
    """Bytes of the keys and values that the cross-attention layers really hold."""
    layers = [cache.layers[index] for index in layer_indices]
    held = [layer.held() if isinstance(layer, EightBitLayer) else (layer.keys, layer.values) for layer in layers]
    return sum(tensor.numel() * tensor.element_size() for tensors in held for tensor in tensors)


def bytes_per_feature(cache: Cache, layer_indices: tuple[int, ...]) -> int:
    """Bytes that one feature's keys and values take in all cross-attention layers together."""
    layers = [cache.layers[index] for index in layer_indices]
    return sum(
        tensor.shape[1] * tensor.shape[3] * tensor.element_size()
        for layer in layers
        for tensor in (layer.keys, layer.values)
    )
