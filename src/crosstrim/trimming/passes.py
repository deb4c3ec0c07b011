"""One forward pass of a trimmed model, from the hook before the model to the hook after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from crosstrim.config import TrimConfig
from crosstrim.errors import InputError
from crosstrim.method.choose import Choice, Processes, choose
from crosstrim.method.rating import last_turn_rows, real_rows
from crosstrim.method.saliency import saliency
from crosstrim.method.selection import most_of, share_of
from crosstrim.models import compat, mllama
from crosstrim.models.interface import Attended, Call
from crosstrim.trimming.cache import ImageCache, Switch
from crosstrim.trimming.kept import Kept, LayersKept, extended
from crosstrim.trimming.uncached import Evidence, Uncached

Hides = tuple[bool, bool]
"""Whether from some row that sees anything some feature is hidden; and whether one is that another row sees."""


@dataclass(frozen=True)
class Trim:
    """What all passes of a trimmed model share."""

    config: TrimConfig
    model: mllama.Mllama
    processes: Processes  # that share its heads
    uncached: Uncached = field(default_factory=Uncached)  # choices of generations without a cache
    switch: Switch = field(default_factory=Switch)

    def cache(self, cache: Any) -> ImageCache:
        """The cross-attention layers of a KV cache of the model."""
        return ImageCache(cache, self.model.layer_indices, self.switch, self.config.kv_dtype)

    @property
    def blind_rows_leak(self) -> bool:
        """Whether rows before the image attend to everything, padding included, and that must not show.

        A tier that drops nothing promises the same answers. Where such rows were not repaired, padding can only go
        once they have been computed: followers still see all of it, and only their caches drop what goes.
        """
        return self.config.drops_nothing and not compat.blind_rows_pass_through(self.model.leader)

    def layers(self, choice: Choice, sees: torch.Tensor, last: int, older: int) -> tuple[LayersKept, Hides | None]:
        """The choice for the leader, and for every follower all or a share of it; and what it hides.

        Here the host looks at the device. `sees` [B, T, M] bool is what each row sees, features that were chosen from
        before first, `older` of them; `last` is the prompt's last row.
        """
        config, kept = self.config, choice.kept
        if self.blind_rows_leak:  # then a sample that sees nothing reads everything, and dropping any would show
            kept = kept | ~(choice.visible.any(-1) & sees[:, last].any(-1)).unsqueeze(-1)
        counts, hides = self._looked_up(choice.visible, kept, sees, older)
        seen = choice.evidence
        leader = replace(Kept.of(kept, choice.visible, _whole(counts)), drew=seen.saliency if seen else None)

        def follower(share: float) -> Kept:
            own, stay = leader, counts
            if share != 1:
                stay = torch.stack([counts[..., 0], share_of(share, counts[..., 1])], -1)
                own = Kept.of(choice.share(share), choice.visible, _whole(stay))
            # Not for the leader, which has read everything.
            groups = choice.groups(own.kept, stay.tolist()) if config.merge and not config.drops_nothing else None
            return own if groups is None else replace(own, groups=groups)

        shares = config.voters().shares(len(self.model.followers))
        made = {share: follower(share) for share in shares}
        return (leader, *(made[share] for share in shares)), hides

    def _looked_up(
        self, visible: torch.Tensor, kept: torch.Tensor, sees: torch.Tensor, older: int
    ) -> tuple[torch.Tensor, Hides | None]:
        """On the CPU [B, I, 2] int64, how many features of each image are visible and stay; and what is hidden."""
        size = self.model.geometry.features_per_image
        if kept.is_meta:  # where nothing can be counted
            most = most_of(size, keep=self.config.keep)
            return torch.full((len(kept), kept.shape[1] // size, 2), most, device="cpu"), None
        counts, columns = torch.stack([visible, kept], -1).unflatten(1, (-1, size)).sum(2), older + kept.shape[1]
        blind = sees.any(-1, keepdim=True).logical_not()  # rows that attend to everything, whatever masks say
        hidden = (sees | blind).logical_not()
        stay = sees.any(1, keepdim=True)
        stay[..., : older * sees.shape[2] // columns] = True  # chosen before, whoever sees them now
        hides = torch.stack([hidden.any(), (hidden & stay).any()])
        *numbers, any_at_all, any_seen = torch.cat([counts.flatten(), hides]).tolist()
        return torch.tensor(numbers, device="cpu").view(counts.shape), (bool(any_at_all), bool(any_seen))


def _whole(counts: torch.Tensor) -> tuple[int, ...]:
    """How many features of each sample stay, of `counts` [B, I, 2]."""
    return tuple(counts[..., 1].sum(-1).tolist())


Shortened = tuple[torch.Tensor | None, tuple[int, ...] | None, torch.Tensor | None]
"""What `Call.attend` takes: a mask, counts, and a bias."""

Made = dict[tuple[int, torch.device], Shortened]
"""Those of a pass, each made once for all of its layers that share it."""


def shortened(call: Call, kept: Kept | None, made: Made, hides: bool | None = None) -> Shortened:
    """The call's mask over the slots of `kept`, how many slots each sample reads, and what these add to logits.

    `hides` is as for `Kept.readable`. The counts are None where the mask says more than they do, and where the layer
    has nothing to shorten it to.
    """
    if kept is None:
        return call.mask, None, None
    rows, dtype, device = call.queries.shape[2], call.queries.dtype, call.queries.device
    if torch.compiler.is_dynamo_compiling():  # then by tensors alone: a graph looks into none
        return kept.trim_mask(call.mask, rows, dtype), None, None
    if (id(kept), device) not in made:
        mask = kept.trim_mask(call.mask, rows, dtype)
        counts, bias = kept.readable(mask, hides), kept.bias(call.queries)
        made[id(kept), device] = None if mask is None else mask.to(device), counts, bias
    return made[id(kept), device]


class TextPass:
    """A pass without new images, on a cache whose layers were trimmed to `kept`; None where one holds everything."""

    images = None

    def __init__(self, trim: Trim, kept: Sequence[Kept | None]) -> None:
        self._kept = dict(zip(trim.model.layer_indices, kept, strict=True))
        self._made: Made = {}

    def attend(self, call: Call) -> Attended:
        """Attend to what the layer's cache holds."""
        return call.attend(*shortened(call, self._kept[call.layer], self._made))


@dataclass(frozen=True)
class Chosen:
    """What the leader has chosen, layer by layer."""

    appended: LayersKept  # what the new images are trimmed to
    after: LayersKept  # what the whole conversation is trimmed to
    read: tuple[Kept | None, ...]  # in this pass; None where that is every feature, whatever was kept before


@dataclass(eq=False)
class ImagePass:
    """A pass that brings images: the leader chooses, and the other layers follow.

    Rows after the prompt were generated or guessed: they do not rate, and they see what a generated token sees.
    """

    trim: Trim
    tokens: torch.Tensor  # [B, T] ids, or [B, T, hidden] embeddings
    attention_mask: torch.Tensor | None  # of the text, as the model got it
    sees: torch.Tensor | None  # [B, T, images * tiles] bool, what each text row may see; None: everything
    images: torch.Tensor  # the tensor that brings them
    before: LayersKept | None  # what the cache was trimmed to before this pass
    past: int | None  # tokens in the cache before this pass; None without a cache
    trims_leader: bool  # whether the leader's own cache holds the kept features alone, and not every one
    prompt_rows: int
    cache: ImageCache | None = None  # once the leader was reached; None without one
    chosen: Chosen | None = None  # once the leader has chosen
    hides: Hides | None = None  # what the masks do; None: look
    _made: Made = field(default_factory=dict)
    _features: dict[int, torch.Tensor] = field(default_factory=dict)

    def enter_leader(self, cache: Any) -> None:
        """Before the leader: learn the cache, which the model may have made itself."""
        if cache is not None:
            self.cache = self.trim.cache(cache)
            self.cache.let_grow()

    def features(self, place: int, states: torch.Tensor) -> torch.Tensor:
        """What a follower reads of the new images' `states`, gathered once for all layers that read the same."""
        if self.chosen is None or self.trim.blind_rows_leak:
            return states
        kept, sequence = self.chosen.appended[place], mllama.as_sequence(states, len(self.tokens))
        # A layer that is computed again for its gradient must gather again.
        made = {} if states.requires_grad else self._features
        if id(kept) not in made:
            made[id(kept)] = kept.trim_features(sequence)
        return made[id(kept)]

    def attend(self, call: Call) -> Attended:
        """Attend in place of a layer: the leader to everything, of which it chooses, and the others to what stays."""
        place = self.trim.model.layer_indices.index(call.layer)
        if place == 0:  # which has chosen before where it is computed again for its gradient
            self.chosen = self.chosen or self._choose(call)
        chosen = self.chosen
        if chosen is None:  # the leader ran without us, which the hook after the model tells
            return call.attend(call.mask)
        hides = self.hides and self.hides[chosen.read[place] is chosen.after[place]]
        mask, counts, bias = shortened(call, chosen.read[place], self._made, hides)
        goes_on = self.prompt_rows < call.queries.shape[2]
        if place == 0 and self.trims_leader and goes_on and not chosen.appended[0].complete:
            mask, counts = self._hidden_after_the_prompt(mask, chosen.appended[0], call), None
        output = call.attend(mask, counts, bias)
        self._settle(place, chosen, call)
        return output

    def _hidden_after_the_prompt(self, mask: torch.Tensor | None, kept: Kept, call: Call) -> torch.Tensor:
        """The leader's mask with what was dropped of the new images hidden from the rows after the prompt."""
        rows, columns = call.queries.shape[2], call.keys.shape[2]
        dropped = torch.ones_like(kept.kept).scatter(1, kept.slots, ~kept.occupied).to(call.queries.device)
        dropped = torch.nn.functional.pad(dropped, (columns - kept.feature_count, 0))
        if mask is None:
            mask = call.queries.new_zeros(len(dropped), 1, rows, columns)
        later = torch.arange(rows, device=mask.device) >= self.prompt_rows
        return mask.masked_fill(later[:, None] & dropped[:, None, None], torch.finfo(mask.dtype).min)

    def _settle(self, place: int, chosen: Chosen, call: Call) -> None:
        """Leave in the layer's cache, if there is one, what stays, and let it carry what was kept."""
        if self.cache is not None:
            whole = place == 0 and not self.trims_leader
            if not whole and chosen.read[place] is not chosen.after[place]:  # the call has read everything
                self.cache.shrink(place, chosen.appended[place], call.keys, call.values)
            self.cache.adopt(place, chosen.after[place], whole)

    def _choose(self, call: Call) -> Chosen:
        older = 0
        if self.before is not None:
            older = self.before[0].length if self.trims_leader else self.before[0].feature_count
        everything = Kept.everything(len(call.queries), call.keys.shape[2] - older, call.queries.device)
        untrimmed = extended(self.before, (everything,) * len(self.trim.model.cross_layers))
        appended = self._appended(call, self._visible(call, untrimmed[0]), older)
        after = extended(self.before, appended)
        leader = untrimmed[0] if self.trims_leader or not older else None
        followers = untrimmed if self.trim.blind_rows_leak else after
        return Chosen(appended, after, (leader, *followers[1:]))

    def _visible(self, call: Call, untrimmed: Kept) -> torch.Tensor:
        """[B, T, columns] bool, what the text rows may see of the leader's columns; or of the tiles that they are."""
        size, tiles = self.trim.model.geometry.features_per_tile, self.sees
        if tiles is None:
            count, rows = untrimmed.feature_count // size, call.queries.shape[2]
            tiles = call.queries.new_ones(len(call.queries), rows, count, dtype=torch.bool)
        tiles = tiles.to(call.queries.device)
        if not (self.before and self.trims_leader):
            return tiles
        return untrimmed.trim_visible(tiles.repeat_interleave(size, dim=-1))

    def _appended(self, call: Call, visible: torch.Tensor, older: int) -> LayersKept:
        """What stays of the new images. Without a cache every token passes the prompt again, which decides once."""
        if self.cache is not None or torch.is_grad_enabled():  # the latter in training
            return self._chosen_anew(call, visible, older)
        uncached, mask = self.trim.uncached, self.attention_mask
        rows = self.tokens, None if mask is None or mask.dim() != 2 else mask, self.sees
        prompt = uncached.find(self.images, rows)
        if prompt is not None:
            same = prompt.rests_on(self._evidence(call, visible, prompt.length))
            if self.trim.processes.agree(torch.tensor(same, device=call.queries.device)):
                self.prompt_rows = prompt.length
                return prompt.kept
        layers = self._chosen_anew(call, visible, older)
        uncached.remember(self.images, rows, self._evidence(call, visible, self.prompt_rows), layers)
        return layers

    def _chosen_anew(self, call: Call, visible: torch.Tensor, older: int) -> LayersKept:
        config, model, rows = self.trim.config, self.trim.model, slice(self.prompt_rows)
        batch, _, count, _ = call.queries.shape
        rating = None
        if config.rating_rows == "last_turn":
            if self.tokens.is_floating_point():
                raise InputError(
                    'rating_rows="last_turn" needs input_ids to find the turn, but inputs_embeds were given; '
                    'pass input_ids or use rating_rows="all".'
                )
            turn_ids = config.user_turn_ids or model.user_turn_ids
            rating = last_turn_rows(self.tokens[:, rows], model.image_token_id, turn_ids).to(visible.device)
        choice = choose(
            call.queries[:, :, rows],
            call.keys,
            call.values,
            visible[:, rows],
            config,
            geometry=model.geometry,
            older=older,
            real_rows=real_rows(self.attention_mask, batch, count, visible.device, self.past)[:, rows],
            rating_rows=rating,
            scale=call.scale,
            processes=self.trim.processes,
        )
        layers, self.hides = self.trim.layers(choice, visible, self.prompt_rows - 1, older)
        return layers

    def _evidence(self, call: Call, visible: torch.Tensor, rows: int) -> Evidence:
        """What a choice on the first `rows` rests on beside these rows: numbers that change with whatever matters."""
        if self.trim.config.lossless:
            return ()
        scores = saliency(call.queries[:, :, :rows], call.keys, visible[:, :rows], scale=call.scale)
        return tuple(one.to(call.queries.dtype) for one in (scores, call.keys.sum(-1), call.values.sum(-1)))
