"""What the hooks know of the forward pass they are in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from crosstrim.errors import InputError
from crosstrim.state import LayerStates, TrimState, UncachedPrompt


@dataclass
class ForwardPass:
    """One forward pass of one thread, between the hooks that begin and end it.

    Attributes:
        tokens: [B, T] ids, or [B, T, hidden] embeddings.
        attention_mask: of the text, as the model got it.
        cache: past_key_values of this pass, None without one.
        before: what the cache was trimmed to before this pass, layer by layer.
        images: the tensor that brings new images, None when there are none.
        past: tokens in the cache before this pass, None without a cache.
        trims_leader: whether the leader's own cache holds the kept features alone, and not every one.
        continuation: how many of the last rows already continue the prompt (see `TrimHandle._expect`).
        prompt: without a cache, the earlier pass whose selection this one reuses.
        queries: [B, Hq, T, D] of the leader, when it scores.
        keys: [B, Hkv, N new, D] of the leader, when it scores.
        values: of the leader, when it scores: [B * images * tiles, features per tile, Hkv * D], as v_proj gives them.
        wide: the states in which all new features stay beside what was kept before.
        visible: [B, T, N] bool over what the leader attends to, when there are new images.
        appended: what the new images were trimmed to, once the leader has decided.
        after: what the whole conversation is trimmed to, likewise.
        full_mask: the additive mask over all features of the conversation, when there are new images.
        counts: features that each sample reads in the layer that runs, from the first on; None: its mask says.
        call: the cross-attention that runs without a mask at this moment.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    cache: Any
    before: LayerStates | None
    images: torch.Tensor | None
    past: int | None = None
    trims_leader: bool = True
    continuation: int = 0
    prompt: UncachedPrompt | None = None
    queries: torch.Tensor = field(init=False)
    keys: torch.Tensor = field(init=False)
    values: torch.Tensor = field(init=False)
    wide: LayerStates = field(init=False)
    visible: torch.Tensor = field(init=False)
    appended: LayerStates = field(init=False)
    after: LayerStates | None = None
    full_mask: torch.Tensor | None = None
    counts: tuple[int, ...] | None = None
    call: Any = None
    _masks: dict[int, tuple[torch.Tensor | None, tuple[int, ...] | None]] = field(default_factory=dict)
    _read: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[torch.Tensor | None, ...]:
        """What a choice follows from beside the images, row by row: tokens, their mask, and what they may see."""
        mask = self.attention_mask
        return self.tokens, None if mask is None or mask.dim() != 2 else mask, self.visible

    def mask(self, state: TrimState, mask: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The mask over all features as one over the slots of `state`, made once for all layers that share it.

        Sets `counts` for the layer that asks.
        """
        if id(state) not in self._masks:
            trimmed = state.trim_mask(mask, hidden_states.shape[1], hidden_states.dtype)
            self._masks[id(state)] = trimmed, state.readable(trimmed)
        trimmed, self.counts = self._masks[id(state)]
        return trimmed

    def read(self, state: TrimState, features: torch.Tensor) -> torch.Tensor:
        """The kept ones of the new `features`, gathered once for all layers that share `state`."""
        if id(state) not in self._read:
            self._read[id(state)] = state.trim_features(features)
        return self._read[id(state)]

    def forget_scores(self) -> None:
        """Let go of what only scoring needed."""
        for name in ("queries", "keys", "values", "visible"):
            self.__dict__.pop(name, None)


def visible_features(
    mask: torch.Tensor | None, row_mask: torch.Tensor | None, hidden_states: torch.Tensor, columns: int
) -> torch.Tensor:
    """What each text row may see.

    Args:
        mask: additive [B, 1, T, columns]; None hides nothing.
        row_mask: [B, 1, T, 1], zero for rows that see nothing although `mask` says otherwise; None: no such rows.
        hidden_states: [B, T, hidden], the text rows.
        columns: features the leader attends to.

    Returns:
        [B, T, columns] bool.
    """
    if mask is None:
        return torch.ones(*hidden_states.shape[:2], columns, dtype=torch.bool, device=hidden_states.device)
    seen = mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return seen if row_mask is None else seen & (row_mask[:, 0] != 0)


def check_rows(mask: torch.Tensor, tokens: torch.Tensor, cache: Any) -> None:
    """Refuse a mask that is too short for the tokens, which transformers would fail on, or worse, broadcast.

    Args:
        mask: cross_attention_mask as the processor makes it, [B, rows, images, tiles].
        tokens: [B, T] or [B, T, hidden].
        cache: past_key_values or None.

    Raises:
        InputError: the mask is for neither T rows nor all rows so far.
    """
    rows, past = tokens.shape[1], 0 if cache is None else int(cache.get_seq_length())
    if mask.shape[1] != rows and mask.shape[1] < past + rows:
        import transformers

        raise InputError(
            f"cross_attention_mask covers {mask.shape[1]} text rows, but this pass reaches row {past + rows}. "
            f"Assisted and prompt-lookup decoding do this to Mllama in transformers {transformers.__version__}, "
            "which cannot run them untrimmed either; use a newer transformers or plain decoding."
        )


def check_samples(states: LayerStates | None, tokens: torch.Tensor) -> None:
    """Refuse another number of samples than the cache holds.

    Args:
        states: what the cache was trimmed to.
        tokens: [B, T] or [B, T, hidden].

    Raises:
        InputError: B is not that of the cache.
    """
    if states is not None and states[0].kept.shape[0] != tokens.shape[0]:
        raise InputError(
            f"the cache holds {states[0].kept.shape[0]} samples and the input {tokens.shape[0]}; "
            "repeat or select both alike."
        )


def check_images(
    mask: torch.Tensor | None, before: LayerStates | None, new_count: int, features_per_image: int
) -> None:
    """Refuse a mask for other images than those in the cache and in this pass.

    Args:
        mask: additive [B, 1, T, N] or None.
        before: what the cache was trimmed to.
        new_count: features that this pass brings.
        features_per_image: features of one image.

    Raises:
        InputError: N is not what both hold together.
    """
    old_count = 0 if before is None else before[0].feature_count
    if mask is not None and mask.shape[-1] != old_count + new_count:
        images, old, new = (count // features_per_image for count in (mask.shape[-1], old_count, new_count))
        raise InputError(
            f"cross_attention_mask is for {images} images, but the cache holds {old} and this pass brings {new}. To "
            "go on with a conversation, pass the mask of all of its images, and pixel_values of those alone that are "
            "not in the cache yet (None when there are none)."
        )
