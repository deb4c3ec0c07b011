"""One request's prompt in an engine that packs requests: what its rows see, what it keeps, and how they attend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from crosstrim.config import TrimConfig
from crosstrim.errors import InputError
from crosstrim.method.choose import Processes, choose
from crosstrim.method.geometry import Geometry
from crosstrim.method.rating import last_turn_rows
from crosstrim.method.selection import budget_of
from crosstrim.models import mllama

AllHeads = Callable[[torch.Tensor], torch.Tensor]
"""Joins [1, heads of this rank, ...] of all tensor-parallel ranks along the heads, bit by bit alike in every rank."""

Project = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""A layer's keys and values [M, Hkv, D] of features [M, hidden], of this tensor-parallel rank, after the key norm."""


@dataclass(frozen=True)
class PromptTrim:
    """The options, applied to the prompts of a model."""

    config: TrimConfig  # every layer keeps the same
    geometry: Geometry
    image_token_id: int  # of `<|image|>`
    user_turn_ids: tuple[int, ...] | None  # that open a user turn

    @classmethod
    def of(cls, config: TrimConfig, model: Any) -> PromptTrim:
        """For the prompts of a model, of which `model` is the `MllamaConfig`."""
        user_turn_ids = config.user_turn_ids or mllama.user_turn_ids_of(model)
        return cls(config, mllama.geometry_of(model), model.image_token_index, user_turn_ids)

    def visible(self, token_ids: Sequence[int], tiles: Sequence[int]) -> torch.Tensor:
        """[T, M] bool on the CPU, what each text row may see of all tiles of the images, padding tiles counted.

        These are the real tiles of the images that come last before it. The ids [T] have one `<|image|>` for each
        image, and `tiles` says how many of its tiles are real.
        """
        # Meta's rule, as transformers' own processor states it.
        from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

        spans = get_cross_attention_token_mask(list(token_ids), self.image_token_id)
        seen = torch.zeros(len(token_ids), len(tiles), self.geometry.tiles_per_image, dtype=torch.bool)
        for image, ((start, end), count) in enumerate(zip(spans, tiles, strict=True)):
            seen[start : len(token_ids) if end == -1 else end, image, :count] = True
        return seen.flatten(1)

    def features_of(self, tiles: torch.Tensor) -> torch.Tensor:
        """[..., M] of tiles to [..., N] of their features."""
        return tiles.repeat_interleave(self.geometry.features_per_tile, dim=-1)

    def slots(self, token_ids: Sequence[int], tiles: Sequence[int]) -> int:
        """KV slots that suffice for what will be kept: exact but for `k`, which is bounded by the number of voters.

        Only what the last row sees is ever read again, so earlier images need none.
        """
        visible = self.features_of(self.visible(token_ids, tiles)[-1:]).unflatten(-1, (len(tiles), -1))
        config, voters = self.config, 1 if self.config.k is None else self.geometry.query_heads
        budget = budget_of(visible, k=config.k, keep=config.keep, k_base=config.k_base)
        return int(torch.minimum(visible.sum(-1), voters * budget).sum())

    def largest(self, images: int) -> int:
        """KV slots of so many images that stand together and fill all of their tiles."""
        return self.slots([self.image_token_id] * images, [self.geometry.tiles_per_image] * images)

    def with_keep(self, keep: float | int | None) -> PromptTrim:
        """The same with another budget; None keeps all that can be seen.

        Raises:
            ConfigError: it is out of range.
        """
        policy = None if keep is None else self.config.policy
        return replace(self, config=replace(self.config, keep=keep, policy=policy))

    def check_images(self, token_ids: Sequence[int], images: int) -> None:
        """Refuse a prompt after which not all of its images are seen, for engines that hold one set for all rows.

        Raises:
            InputError: there are more or fewer `<|image|>` than images, or text stands between two of them.
        """
        places = [place for place, token in enumerate(token_ids) if token == self.image_token_id]
        if len(places) != images:
            raise InputError(
                f"the prompt has {len(places)} image tokens (<|image|>) for {images} pictures; give one for each."
            )
        if places and places[-1] - places[0] != len(places) - 1:
            raise InputError(
                "the prompt has text between two pictures, so that what follows the last one sees that one alone; "
                "here all pictures of a request must stand side by side. Move them together, or ask with one."
            )

    def choose(
        self,
        token_ids: Sequence[int],
        visible: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        all_heads: AllHeads,
    ) -> torch.Tensor:
        """[N] bool beside the queries, whether the feature stays, as the first cross-attention layer chooses.

        Queries [T, Hq, D] and keys and values [N, Hkv, D] are those of this tensor-parallel rank, after the norms.
        What the rows see [T, M] is on the CPU, as `visible` gives it, so that nobody has to wait for the device.
        """
        rating = None
        if self.config.rating_rows == "last_turn":
            rating = last_turn_rows(torch.tensor([token_ids]), self.image_token_id, self.user_turn_ids)
        query, key, value = (heads.transpose(0, 1).unsqueeze(0) for heads in (queries, keys, values))
        others: dict[str, Any] = {"geometry": self.geometry, "rating_rows": rating, "processes": Processes(all_heads)}
        choice = choose(query, key, value, visible.unsqueeze(0), self.config, **others)
        # Rows to come see what the last one sees.
        return choice.kept[0] & self.features_of(visible[-1]).to(queries.device, non_blocking=True)


class Prompt:
    """One request with images whose prompt is computed in this step, as the cross-attention layers meet it.

    What its rows see is looked up before anything is computed, so that no layer has to ask the device.

    Attributes:
        trim: what it keeps.
        rows: its text rows among those of the batch. Those beyond the prompt were generated before the request lost
            its memory: they do not rate, and read what they read then.
        features: [N, hidden] of its images, padding tiles included.
        prompt_rows: text rows of the prompt.
        kept: [K] int64, ascending; None until the first cross-attention layer has chosen.
        count: K; None where only the device will know.
        asked: the prompt's ids and what its rows see, as for `PromptTrim.choose`.
    """

    def __init__(
        self, trim: PromptTrim, prompt_ids: Sequence[int], tiles: Sequence[int], rows: slice, features: torch.Tensor
    ) -> None:
        seen = trim.visible(prompt_ids, tiles)
        visible = torch.cat([seen, seen[-1:].expand(rows.stop - rows.start - len(seen), -1)])
        self.trim, self.rows, self.prompt_rows = trim, rows, len(prompt_ids)
        self.features = features[: visible.shape[1] * trim.geometry.features_per_tile]
        self.kept: torch.Tensor | None = None
        self.count = None if trim.config.count_depends_on_prompt else trim.slots(prompt_ids, tiles)
        self.asked = prompt_ids, seen
        self._first = int(visible.any(-1).int().argmax())
        self._alike = bool((visible[self._first :] == visible[-1]).all())
        self._visible = visible.to(features.device, non_blocking=True)
        columns = trim.features_of(visible.any(0)).nonzero().squeeze(-1)
        self._columns = columns.to(features.device, non_blocking=True)

    @property
    def sees(self) -> torch.Tensor:
        """[T] bool, whether the row sees any image."""
        return self._visible.any(-1)

    def lead(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[T, Hq, D], attention in the first layer, given keys and values [N, Hkv, D] of all features."""
        asked, seen = queries[: self.prompt_rows], self._columns
        output = self._attend(asked, keys[seen], values[seen], seen)
        if len(asked) == len(queries):
            return output
        later = queries[len(asked) :]  # they read what is kept
        return torch.cat([output, attend(later, keys[self.kept], values[self.kept])])

    def follow(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[T, Hq, D], attention in a later layer to keys and values [K, Hkv, D] of what is kept."""
        return self._attend(queries, keys, values, self.kept)

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, columns: Any) -> torch.Tensor:
        """Attention of the first rows to those of the features `columns` that each sees."""
        output, seeing = torch.zeros_like(queries), slice(self._first, len(queries))
        visible = None if self._alike else self.trim.features_of(self._visible[seeing])[:, columns]
        output[seeing] = attend(queries[seeing], keys, values, visible)
        return output


def cross_attend(
    prompts: Sequence[Prompt], queries: torch.Tensor, project: Project, all_heads: AllHeads | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What a cross-attention layer does for the prompts of a batch. The first one chooses what they keep.

    The host looks at the device once at most, for all of the batch: where prompts decide how much stays.

    Args:
        prompts: the requests with images.
        queries: [rows, Hq, D] of the batch, after the query norm.
        project: the layer's own.
        all_heads: in the first layer; None in the others.

    Yields:
        For each prompt the keys and values [K, Hkv, D] of what it keeps, and its rows' attention [T, Hq, D].
    """
    if all_heads is None:
        for prompt in prompts:
            keys, values = project(prompt.features[prompt.kept])
            yield keys, values, prompt.follow(queries[prompt.rows], keys, values)
        return
    # Those of a group have their keys and values of all features at the same time: as few as can be.
    together = any(prompt.kept is None and prompt.count is None for prompt in prompts)
    for group in [prompts] if together else [[prompt] for prompt in prompts]:
        projected = [project(prompt.features) for prompt in group]
        new = [(prompt, own) for prompt, own in zip(group, projected, strict=True) if prompt.kept is None]
        stays = []
        for prompt, own in new:
            rows = queries[prompt.rows][: prompt.prompt_rows]
            stays.append(prompt.trim.choose(*prompt.asked, rows, *own, all_heads))
        asked = [one.sum() for (prompt, _), one in zip(new, stays, strict=True) if prompt.count is None]
        counts = iter(torch.stack(asked).tolist() if asked else ())
        for (prompt, _), one in zip(new, stays, strict=True):
            count = next(counts) if prompt.count is None else prompt.count
            prompt.kept = (~one).int().argsort(stable=True)[:count]
        for prompt, (keys, values) in zip(group, projected, strict=True):
            yield keys[prompt.kept], values[prompt.kept], prompt.lead(queries[prompt.rows], keys, values)


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, Hq, D], attention of queries [T, Hq, D] to keys and values [M, Hkv, D] that are `visible` [T, M] bool.

    None: every row sees all. Rows that see nothing get zeros, as in Meta's reference.
    """
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (queries, keys, values))
    grouped = query.shape[1] != key.shape[1]
    if visible is None:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)[0].transpose(0, 1)
    blind = ~visible.any(-1, keepdim=True)  # a row that is all masked would be NaN
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible | blind, enable_gqa=grouped)
    return output[0].transpose(0, 1).masked_fill(blind.unsqueeze(-1), 0)
