"""One request's prompt in an engine that packs requests: what its rows see, what it keeps, and how they attend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from crosstrim.config import TrimConfig
from crosstrim.method.choose import Processes, choose
from crosstrim.method.geometry import Geometry
from crosstrim.method.rows import last_turn_rows
from crosstrim.method.selection import budget_of


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

    @property
    def count_depends_on_prompt(self) -> bool:
        """Whether how much stays is only known once the features were scored."""
        return not self.config.lossless and self.config.keep is None

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
        if self.count_depends_on_prompt and config.k is None:
            return int(counts.sum())
        voters = 1 if config.k is None else self.geometry.query_heads
        budget = budget_of(visible, k=config.k, keep=config.keep, k_base=config.k_base)
        return int(torch.minimum(counts, voters * budget).sum())

    def choose(
        self,
        token_ids: torch.Tensor,
        visible: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        all_heads: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Choose in the first cross-attention layer.

        Args:
            token_ids: [T] of the prompt.
            visible: [T, N] bool.
            queries: [T, Hq, D] of this tensor-parallel rank, after the query norm.
            keys: [N, Hkv, D] likewise.
            values: [N, Hkv, D] likewise.
            all_heads: joins the ranks' [1, heads, ...] along the heads. Every rank then chooses the same.

        Returns:
            [K] int64, the features that stay, in ascending order.
        """
        rating = None
        if self.config.rating_rows == "last_turn":
            turn_ids = self.config.user_turn_ids or self.user_turn_ids
            rating = last_turn_rows(token_ids.unsqueeze(0), self.image_token_id, turn_ids)
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
        return (choice.kept[0] & visible[-1]).nonzero().squeeze(-1)  # rows to come see what the last one sees


class _Ranks(Processes):
    """Tensor-parallel ranks. All are given the same, bit by bit, and so choose the same."""

    def __init__(self, all_heads: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._all_heads = all_heads

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """[1, heads of this rank, ...] to [1, all heads, ...]."""
        return self._all_heads(tensor)


def hidden_after(visible: torch.Tensor, kept: torch.Tensor, prompt_rows: int) -> torch.Tensor:
    """What rows see once a choice was made: those after the prompt see only what it kept.

    A request that lost its memory is computed again together with what it had generated, and must read what it read.

    Args:
        visible: [T, N] bool.
        kept: [K] int64.
        prompt_rows: text rows of the prompt.

    Returns:
        [T, N] bool.
    """
    stays = torch.zeros_like(visible[0]).index_fill_(0, kept, True)
    return torch.cat([visible[:prompt_rows], visible[prompt_rows:] & stays])


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
