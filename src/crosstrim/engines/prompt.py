"""One request's prompt in an engine that packs requests: what its rows see, what it keeps, and how they attend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class PromptTrim:
    """The options, applied to the prompts of a model.

    Attributes:
        config: of the trim; every layer keeps the same.
        geometry: of the model.
        image_token_id: id of `<|image|>`.
        user_turn_ids: token ids that open a user turn, or None.
    """

    config: TrimConfig
    geometry: Geometry
    image_token_id: int
    user_turn_ids: tuple[int, ...] | None

    @classmethod
    def of(cls, config: TrimConfig, model: Any) -> PromptTrim:
        """For the prompts of a model.

        Args:
            config: of the trim.
            model: an `MllamaConfig`.
        """
        has_llamas_words = model.text_config.vocab_size == mllama.LLAMA_VOCABULARY_SIZE
        user_turn_ids = mllama.LLAMA_USER_TURN_IDS if has_llamas_words else None
        return cls(config, mllama.geometry_of(model), model.image_token_index, config.user_turn_ids or user_turn_ids)

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

        spans = get_cross_attention_token_mask(list(token_ids), self.image_token_id)
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
        counts, config = visible.sum(-1), self.config
        if config.count_depends_on_prompt and config.k is None:
            return int(counts.sum())
        voters = 1 if config.k is None else self.geometry.query_heads
        budget = budget_of(visible, k=config.k, keep=config.keep, k_base=config.k_base)
        return int(torch.minimum(counts, voters * budget).sum())

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

        Args:
            token_ids: [T].
            images: that came with it.

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
        token_ids: torch.Tensor,
        visible: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        all_heads: Callable[[torch.Tensor], torch.Tensor],
        count: int | None = None,
    ) -> torch.Tensor:
        """Choose in the first cross-attention layer.

        Args:
            token_ids: [T] of the prompt.
            visible: [T, N] bool.
            queries: [T, Hq, D] of this tensor-parallel rank, after the query norm.
            keys: [N, Hkv, D] likewise.
            values: [N, Hkv, D] likewise.
            all_heads: joins the ranks' [1, heads, ...] along the heads. Every rank then chooses the same.
            count: K, if it is known; nobody then has to wait for the device to know it.

        Returns:
            [K] int64, the features that stay, in ascending order.
        """
        rating = None
        if self.config.rating_rows == "last_turn":
            rating = last_turn_rows(token_ids.unsqueeze(0), self.image_token_id, self.user_turn_ids)
        choice = choose(
            queries.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            visible.unsqueeze(0),
            self.config,
            geometry=self.geometry,
            rating_rows=rating,
            processes=_Ranks(all_heads),
        )
        stays = choice.kept[0] & visible[-1]  # rows to come see what the last one sees
        return stays.nonzero().squeeze(-1) if count is None else (~stays).int().argsort(stable=True)[:count]


class _Ranks(Processes):
    """Tensor-parallel ranks. All are given the same, bit by bit, and so choose the same."""

    def __init__(self, all_heads: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._all_heads = all_heads

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """[1, heads of this rank, ...] to [1, all heads, ...]."""
        return self._all_heads(tensor)


class Prompt:
    """One request with images whose prompt is computed in this step, as the cross-attention layers meet it.

    What its rows see is looked up before anything is computed, so that no layer has to ask the device.

    Attributes:
        trim: what it keeps.
        rows: its text rows among those of the batch. Those beyond the prompt were generated before the request lost
            its memory: they do not rate, and read what they read then.
        token_ids: [T] of these rows.
        features: [N, hidden] of its images, padding tiles included.
        prompt_rows: text rows of the prompt.
        kept: [K] int64, ascending; None until the first cross-attention layer has chosen.
    """

    def __init__(
        self,
        trim: PromptTrim,
        prompt_ids: Sequence[int],
        tiles: Sequence[int],
        rows: slice,
        token_ids: torch.Tensor,
        features: torch.Tensor,
    ) -> None:
        visible = trim.visible(prompt_ids, tiles)
        visible = torch.cat([visible, visible[-1:].expand(len(token_ids) - len(visible), -1)])
        self.trim, self.rows, self.token_ids = trim, rows, token_ids
        self.features = features[: visible.shape[1]]
        self.prompt_rows = len(prompt_ids)
        self.kept: torch.Tensor | None = None
        self._count = None if trim.config.count_depends_on_prompt else trim.slots(prompt_ids, tiles)
        self._first = int(visible.any(-1).int().argmax())
        self._alike = bool((visible[self._first :] == visible[-1]).all())
        self._visible = visible.to(features.device, non_blocking=True)
        self._columns = visible[-1].nonzero().squeeze(-1).to(features.device, non_blocking=True)

    @property
    def sees(self) -> torch.Tensor:
        """[T] bool, whether the row sees any image."""
        return self._visible.any(-1)

    def lead(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        all_heads: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Choose, where that was not done, and attend in the first cross-attention layer.

        Args:
            queries: [T, Hq, D] of this tensor-parallel rank, after the query norm.
            keys: [N, Hkv, D] likewise, of all features.
            values: [N, Hkv, D] likewise.
            all_heads: as for `PromptTrim.choose`.

        Returns:
            [T, Hq, D]: the prompt's rows attend to what they see, rows after it to what is kept.
        """
        asked, first = self.prompt_rows, self._first
        if self.kept is None:
            rows = self.token_ids[:asked], self._visible[:asked], queries[:asked]
            self.kept = self.trim.choose(*rows, keys, values, all_heads, self._count)
        output = torch.zeros_like(queries)
        if self._alike:
            output[first:asked] = attend(queries[first:asked], keys[self._columns], values[self._columns])
        else:
            output[first:asked] = attend(queries[first:asked], keys, values, self._visible[first:asked])
        if asked < len(queries):
            output[asked:] = attend(queries[asked:], keys[self.kept], values[self.kept])
        return output

    def follow(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attend in a later layer.

        Args:
            queries: [T, Hq, D].
            keys: [K, Hkv, D] of what is kept.
            values: [K, Hkv, D].

        Returns:
            [T, Hq, D].
        """
        output, seeing = torch.zeros_like(queries), slice(self._first, None)
        visible = None if self._alike else self._visible[seeing][:, self.kept]
        output[seeing] = attend(queries[seeing], keys, values, visible)
        return output


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of text rows to image features; rows that see nothing get zeros, as in Meta's reference.

    Args:
        queries: [T, Hq, D].
        keys: [M, Hkv, D].
        values: [M, Hkv, D].
        visible: [T, M] bool; None: every row sees all.

    Returns:
        [T, Hq, D].
    """
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (queries, keys, values))
    blind = None if visible is None else ~visible.any(-1, keepdim=True)
    mask = None if visible is None or blind is None else visible | blind  # a row that is all masked would be NaN
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
    )
    output = output[0].transpose(0, 1)
    return output if blind is None else output.masked_fill(blind.unsqueeze(-1), 0)
