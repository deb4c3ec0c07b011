"""Which image features a request keeps: crosstrim's own score, policies and selection on SGLang's packed requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from crosstrim.config import TrimConfig
from crosstrim.errors import ConfigError
from crosstrim.method.choose import Processes, choose
from crosstrim.method.geometry import Geometry
from crosstrim.method.rating import last_turn_rows
from crosstrim.method.selection import budget_of

FREE_SLOTS = "free_slots"


@dataclass(frozen=True)
class Settings:
    """What to trim in an engine.

    Attributes:
        config: as for `crosstrim.trim`.
        free_slots: whether KV slots that turn out unneeded go back to the pool after the prompt. False keeps them
            allocated and unread, to compare with.
    """

    config: TrimConfig
    free_slots: bool = True

    @property
    def count_depends_on_prompt(self) -> bool:
        """Whether how much stays is only known once the features were scored."""
        return not self.config.lossless and self.config.keep is None

    @classmethod
    def read(cls, overrides: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
        """From the model's config and the environment; no option at all is the lossless tier.

        Args:
            overrides: the object "crosstrim" of SGLang's `--json-model-override-args`.
            environment: `CROSSTRIM_K`, `CROSSTRIM_KEEP`, `CROSSTRIM_POLICY`, and so on for each field of
                `TrimConfig`, as JSON or as plain text.

        Raises:
            ConfigError: an option is unknown, out of range, given in both places, or cannot be had in SGLang.
        """
        names = [*(field.name for field in fields(TrimConfig)), FREE_SLOTS]
        given = {name: environment[_variable(name)] for name in names if _variable(name) in environment}
        both = sorted(set(given) & set(overrides))
        if both:
            raise ConfigError(
                f"{both[0]} is given twice, by {_variable(both[0])}={given[both[0]]} and in the model's config as "
                f"{overrides[both[0]]!r}; remove one."
            )
        values = {**overrides, **{name: _parse(text) for name, text in given.items()}}
        free_slots = values.pop(FREE_SLOTS, True)
        if not isinstance(free_slots, bool):
            raise ConfigError(f"{FREE_SLOTS}={free_slots!r} must be true or false.")
        config = TrimConfig.from_dict(values)
        if not config.trim_first_layer:
            raise ConfigError(
                "trim_first_layer=False cannot be had in SGLang, where one row of KV slots serves all layers; leave "
                "it out."
            )
        if set(config.voters().shares(2)) != {1}:
            raise ConfigError(
                f"policy={config.policy!r} keeps less from layer to layer, which cannot be had in SGLang, where one "
                "row of KV slots serves all layers; choose another policy."
            )
        return cls(config, free_slots)


def _variable(name: str) -> str:
    return f"CROSSTRIM_{name.upper()}"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Kept:
    """What a request keeps for as long as it lives; a request that is prefilled again keeps the same.

    Attributes:
        indices: [K] int64, ascending, over all features of the request's images, padding tiles counted.
        prompt_rows: text rows of the prompt; rows after them were generated.
        free_slots: whether image slots beyond K go back to the pool.
    """

    indices: torch.Tensor
    prompt_rows: int
    free_slots: bool


@dataclass
class Prompt:
    """One request with images in a batch of prompts.

    Attributes:
        images: SGLang's record of its images, which lives as long as the request.
        rows: its text rows among those of the batch.
        token_ids: [T] of these rows.
        features: [N, hidden] of its images, padding tiles included.
        visible: [T, N] bool, what each row may see.
        slots: [S] KV slots of its images, S >= K.
        kept: what it keeps; None until the first cross-attention layer has chosen.
    """

    images: Any
    rows: slice
    token_ids: torch.Tensor
    features: torch.Tensor
    visible: torch.Tensor
    slots: torch.Tensor
    kept: Kept | None = None


class Trimming:
    """The settings applied to a model.

    Args:
        settings: what to trim.
        geometry: of the model.
        image_token_id: id of `<|image|>`.
        user_turn_ids: token ids that open a user turn, or None.
    """

    def __init__(
        self, settings: Settings, geometry: Geometry, image_token_id: int, user_turn_ids: tuple[int, ...] | None
    ) -> None:
        self.settings, self.geometry = settings, geometry
        self._image_token_id = image_token_id
        self._user_turn_ids = settings.config.user_turn_ids or user_turn_ids

    def visible(self, token_ids: Sequence[int], tiles: Sequence[int]) -> torch.Tensor:
        """What each text row may see: the real tiles of the images that come last before it.

        Args:
            token_ids: [T], with one `<|image|>` for each image.
            tiles: real tiles of each image.

        Returns:
            [T, N] bool on the CPU, features in (image, tile, feature) order, padding tiles counted.
        """
        # Meta's rule, as transformers' own processor states it.
        from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

        spans = get_cross_attention_token_mask(list(token_ids), self._image_token_id)
        seen = torch.zeros(len(token_ids), len(tiles), self.geometry.features_per_image, dtype=torch.bool)
        for image, ((start, end), count) in enumerate(zip(spans, tiles, strict=True)):
            rows = slice(start, len(token_ids) if end == -1 else end)
            seen[rows, image, : count * self.geometry.features_per_tile] = True
        return seen.flatten(1)

    def slots(self, token_ids: Sequence[int], tiles: Sequence[int]) -> int:
        """KV slots that suffice for what will be kept: exact but for `k`, which is bounded by the number of voters.

        Only what the last row sees is ever read again, so earlier images need none.
        """
        visible = self.visible(token_ids, tiles)[-1:].unflatten(-1, (len(tiles), -1))
        counts = visible.sum(-1)
        if self.settings.count_depends_on_prompt and self.settings.config.k is None:
            return int(counts.sum())
        config = self.settings.config
        voters = 1 if config.k is None else self.geometry.query_heads
        budget = budget_of(visible, k=config.k, keep=config.keep, k_base=config.k_base)
        return int(torch.minimum(counts, voters * budget).sum())

    def choose(
        self,
        prompt: Prompt,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        all_heads: Callable[[torch.Tensor], torch.Tensor],
    ) -> Kept:
        """Choose in the first cross-attention layer.

        Args:
            prompt: the request.
            queries: [T, Hq, D] of this tensor-parallel rank, after the query norm.
            keys: [N, Hkv, D] likewise.
            values: [N, Hkv, D] likewise.
            all_heads: joins the ranks' [1, heads, ...] along the heads. Every rank then chooses the same.
        """
        rating = None
        if self.settings.config.rating_rows == "last_turn":
            rating = last_turn_rows(prompt.token_ids.unsqueeze(0), self._image_token_id, self._user_turn_ids)
        choice = choose(
            queries.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            prompt.visible.unsqueeze(0),
            self.settings.config,
            geometry=self.geometry,
            rating_rows=rating,
            processes=_Ranks(all_heads),
        )
        needed = choice.kept[0] & prompt.visible[-1]  # rows to come see what the last one sees
        return Kept(needed.nonzero().squeeze(-1), len(prompt.token_ids), self.settings.free_slots)


class _Ranks(Processes):
    """Tensor-parallel ranks. All are given the same, bit by bit, and so choose the same."""

    def __init__(self, all_heads: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._all_heads = all_heads

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """[1, heads of this rank, ...] to [1, all heads, ...]."""
        return self._all_heads(tensor)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Attention of text rows to image features; rows that see nothing get zeros, as in Meta's reference.

    Args:
        queries: [T, Hq, D].
        keys: [M, Hkv, D].
        values: [M, Hkv, D].
        visible: [T, M] bool.

    Returns:
        [T, Hq, D].
    """
    output = torch.zeros_like(queries)
    rows = visible.any(-1)
    if not rows.any():
        return output
    mask = visible[rows]
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (queries[rows], keys, values))
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=None if mask.all() else mask, enable_gqa=query.shape[1] != key.shape[1]
    )
    output[rows] = attended[0].transpose(0, 1)
    return output
