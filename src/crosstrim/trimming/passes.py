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
from crosstrim.method.selection import budget_of, share_of
from crosstrim.models import compat, mllama
from crosstrim.models.interface import Attended, Call
from crosstrim.trimming.cache import ImageCache, Switch
from crosstrim.trimming.kept import Kept, LayersKept, extended
from crosstrim.trimming.uncached import Evidence, Rows, Uncached


@dataclass(frozen=True)
class Trim:
    """What all passes of a trimmed model share.

    Attributes:
        config: the options.
        model: where its layers are.
        processes: those that share its heads.
        uncached: choices of generations without a cache.
        switch: whether the trim is on.
    """

    config: TrimConfig
    model: mllama.Mllama
    processes: Processes
    uncached: Uncached = field(default_factory=Uncached)
    switch: Switch = field(default_factory=Switch)

    @property
    def blind_rows_leak(self) -> bool:
        """Whether rows before the image attend to everything, padding included, and that must not show.

        A tier that drops nothing promises the same answers. Where such rows were not repaired, padding can only go
        once they have been computed.
        """
        return self.config.drops_nothing and not compat.blind_rows_pass_through(self.model.leader)

    def layers(self, choice: Choice, last_row_sees: torch.Tensor) -> LayersKept:
        """The choice for the leader, and for every follower all or a share of it.

        Args:
            choice: of the leader.
            last_row_sees: [B] bool, whether the last row of the prompt sees anything.
        """
        kept, size = choice.kept, self.model.geometry.features_per_image
        if self.blind_rows_leak:  # then a sample that sees nothing reads everything, and dropping any would show
            kept = kept | ~(choice.visible.any(-1) & last_row_sees).unsqueeze(-1)
        most = _most_kept(self.config, kept.shape[1], size)
        leader = Kept.of(kept, choice.visible, size, at_most=most)
        merges = self.config.merge and not self.config.drops_nothing
        groups = choice.groups(kept) if merges else None
        # For the followers: the leader has read everything, and its cache stays plain.
        first = leader if groups is None else replace(leader, groups=groups)
        layers = [leader]
        for share in self.config.voters().shares(len(self.model.followers)):
            at_most, less = int(share_of(share, torch.tensor(most, device="cpu"))), choice.share(share)
            own = (
                first
                if share == 1
                else Kept.of(less, choice.visible, size, at_most, choice.groups(less) if merges else None)
            )
            layers.append(own)
        return tuple(layers)


def _most_kept(config: TrimConfig, count: int, size: int) -> int:
    """An upper bound on the features of `count` that a budget keeps, known without counting."""
    if config.keep is None:
        return count
    per_image = int(budget_of(torch.ones(size, dtype=torch.bool, device="cpu"), keep=config.keep))
    return per_image * (count // size)


Shortened = tuple[torch.Tensor | None, tuple[int, ...] | None, torch.Tensor | None]
"""What `Call.attend` takes: a mask, counts, and a bias."""


class Masks:
    """Masks over what was kept, each made once for all layers of a pass that share it."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device], Shortened] = {}

    def shortened(self, kept: Kept | None, call: Call) -> Shortened:
        """The call's mask over the slots of `kept`, how many slots each sample reads, and what these add to logits.

        The counts are None where the mask says more than they do, and where the layer has nothing to shorten it to.
        """
        if kept is None:
            return call.mask, None, None
        if torch.compiler.is_dynamo_compiling():  # then by tensors alone: a graph looks into none
            return kept.trim_mask_traced(call.mask, call.queries.shape[2], call.queries.dtype), None, None
        device = call.queries.device
        if (id(kept), device) not in self._made:
            mask = kept.trim_mask(call.mask, call.queries.shape[2], call.queries.dtype)
            counts, bias = kept.readable(mask), kept.bias(call.queries)
            self._made[id(kept), device] = None if mask is None else mask.to(device), counts, bias
        return self._made[id(kept), device]


class TextPass:
    """A pass that brings no image, on a cache that holds trimmed ones.

    Args:
        trim: what it shares with other passes.
        kept: what the layers of the cache were trimmed to; None where one holds every feature.
    """

    images = None

    def __init__(self, trim: Trim, kept: Sequence[Kept | None]) -> None:
        self._kept = dict(zip(trim.model.layer_indices, kept, strict=True))
        self._masks = Masks()

    def attend(self, call: Call) -> Attended:
        """Attend to what the layer's cache holds."""
        return call.attend(*self._masks.shortened(self._kept[call.layer], call))


@dataclass(frozen=True)
class Chosen:
    """What the leader has chosen, layer by layer.

    Attributes:
        appended: what the new images are trimmed to.
        after: what the whole conversation is trimmed to.
        untrimmed: the same as if all of the new images stayed.
        late: whether the followers still see all of them in this pass, and only their caches drop what goes.
    """

    appended: LayersKept
    after: LayersKept
    untrimmed: LayersKept
    late: bool


@dataclass(eq=False)
class ImagePass:
    """A pass that brings images: the leader chooses, and the other layers follow.

    Attributes:
        trim: what it shares with other passes.
        tokens: [B, T] ids, or [B, T, hidden] embeddings.
        attention_mask: of the text, as the model got it.
        sees: [B, T, images * tiles] bool, what each text row may see; None: everything.
        images: the tensor that brings them.
        before: what the cache was trimmed to before this pass.
        past: tokens in the cache before this pass, None without a cache.
        trims_leader: whether the leader's own cache holds the kept features alone, and not every one.
        prompt_rows: rows of the prompt. Those after it were generated or guessed: they do not rate, and they see what
            a generated token sees.
        cache: the image features' part of the cache, once the leader was reached; None without one.
        chosen: None until the leader has chosen.
    """

    trim: Trim
    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    sees: torch.Tensor | None
    images: torch.Tensor
    before: LayersKept | None
    past: int | None
    trims_leader: bool
    prompt_rows: int
    cache: ImageCache | None = None
    chosen: Chosen | None = None
    _masks: Masks = field(default_factory=Masks)
    _features: dict[int, torch.Tensor] = field(default_factory=dict)
    _settled: set[int] = field(default_factory=set)

    # What the hooks on the layers ask for.

    def enter_leader(self, cache: Any) -> None:
        """Before the leader: learn the cache, which the model may have made itself."""
        self.cache = None if cache is None else ImageCache(cache, self.trim.model.layer_indices)
        if self.cache is not None:
            self.cache.let_grow(self.trim.switch)

    def features(self, place: int, states: torch.Tensor) -> torch.Tensor:
        """What a follower reads of the new images, gathered once for all layers that read the same.

        Args:
            place: of the follower among the cross-attention layers.
            states: [B * images * tiles, features per tile, hidden], all of them.
        """
        if self.chosen is None or self.chosen.late:
            return states
        kept, sequence = self.chosen.appended[place], mllama.as_sequence(states, len(self.tokens))
        if states.requires_grad:  # a layer that is computed again for its gradient must gather again
            return kept.trim_features(sequence)
        if id(kept) not in self._features:
            self._features[id(kept)] = kept.trim_features(sequence)
        return self._features[id(kept)]

    # What runs in place of the layers' attention.

    def attend(self, call: Call) -> Attended:
        """Attend to everything in the leader, and to what was kept in the followers."""
        place = self.trim.model.layer_indices.index(call.layer)
        if place == 0:
            return self._lead(call)
        if self.chosen is None:  # the leader ran without us, which the hook after the model tells
            return call.attend(call.mask)
        read = self.chosen.untrimmed if self.chosen.late else self.chosen.after
        output = call.attend(*self._masks.shortened(read[place], call))
        self._settle(place, self.chosen, call)
        return output

    def _lead(self, call: Call) -> Attended:
        """Choose, attend to everything, and leave the kept features in the leader's own cache."""
        older = 0 if self.before is None else self._columns_of(self.before[0])
        # Chosen before where the layer is computed again for its gradient.
        chosen = self.chosen = self.chosen or self._choose(call, older)
        read = chosen.untrimmed[0] if self.trims_leader or not older else None
        mask, counts, bias = self._masks.shortened(read, call)
        if self.trims_leader and self.prompt_rows < call.queries.shape[2] and not chosen.appended[0].complete:
            mask, counts = self._hidden_after_the_prompt(mask, chosen.appended[0], older, call), None
        output = call.attend(mask, counts, bias)
        self._settle(0, chosen, call)
        return output

    def _settle(self, place: int, chosen: Chosen, call: Call) -> None:
        """Leave in the layer's cache, if there is one, what stays, and let it carry what was kept."""
        if self.cache is None or place in self._settled:
            return
        whole = place == 0 and not self.trims_leader
        if not whole and (place == 0 or chosen.late):  # the call has read everything
            self.cache.shrink(place, chosen.appended[place], call.keys, call.values)
        self.cache.adopt(place, chosen.after[place], self.trim.switch, self.trim.config.kv_dtype, whole)
        self._settled.add(place)

    def _columns_of(self, kept: Kept) -> int:
        return kept.length if self.trims_leader else kept.feature_count

    def _hidden_after_the_prompt(self, mask: torch.Tensor | None, kept: Kept, older: int, call: Call) -> torch.Tensor:
        """The leader's mask with what was dropped hidden from the rows after the prompt."""
        batch, _, rows, _ = call.queries.shape
        dropped = torch.nn.functional.pad(~kept.read.to(call.queries.device), (older, 0))
        if mask is None:
            mask = call.queries.new_zeros(batch, 1, rows, dropped.shape[1])
        later = torch.arange(rows, device=mask.device) >= self.prompt_rows
        return mask.masked_fill(later[:, None] & dropped[:, None, None], torch.finfo(mask.dtype).min)

    # How the choice comes about.

    def _choose(self, call: Call, older: int) -> Chosen:
        size = self.trim.model.geometry.features_per_image
        everything = Kept.everything(len(call.queries), call.keys.shape[2] - older, size, call.queries.device)
        untrimmed = extended(self.before, (everything,) * len(self.trim.model.cross_layers))
        visible = self._visible(call, untrimmed[0])
        appended = self._reused(call, visible) or self._chosen_anew(call, visible, older)
        return Chosen(appended, extended(self.before, appended), untrimmed, late=self.trim.blind_rows_leak)

    def _visible(self, call: Call, untrimmed: Kept) -> torch.Tensor:
        """[B, T, columns] bool, what the text rows may see of the leader's columns."""
        batch, _, rows, _ = call.queries.shape
        device = call.queries.device
        if self.sees is None:
            visible = torch.ones(batch, rows, untrimmed.feature_count, dtype=torch.bool, device=device)
        else:
            visible = self.sees.to(device).repeat_interleave(self.trim.model.geometry.features_per_tile, dim=-1)
        return untrimmed.trim_visible(visible) if self.before and self.trims_leader else visible

    def _chosen_anew(self, call: Call, visible: torch.Tensor, older: int) -> LayersKept:
        rows = slice(self.prompt_rows)
        batch, _, count, _ = call.queries.shape
        real = real_rows(self.attention_mask, batch, count, visible.device, self.past)
        choice = choose(
            call.queries[:, :, rows],
            call.keys,
            call.values,
            visible[:, rows],
            self.trim.config,
            geometry=self.trim.model.geometry,
            older=older,
            real_rows=real[:, rows],
            rating_rows=self._turn_rows(rows, visible.device),
            scale=call.scale,
            processes=self.trim.processes,
        )
        layers = self.trim.layers(choice, visible[:, self.prompt_rows - 1].any(-1))
        if self._uncached:
            evidence = self._evidence(call, visible, self.prompt_rows)
            self.trim.uncached.remember(self.images, self._rows, evidence, layers)
        return layers

    def _turn_rows(self, rows: slice, device: torch.device) -> torch.Tensor | None:
        config, model = self.trim.config, self.trim.model
        if config.rating_rows == "all":
            return None
        if self.tokens.is_floating_point():
            raise InputError(
                'rating_rows="last_turn" needs input_ids to find the turn, but inputs_embeds were given; '
                'pass input_ids or use rating_rows="all".'
            )
        turn_ids = config.user_turn_ids or model.user_turn_ids
        return last_turn_rows(self.tokens[:, rows], model.image_token_id, turn_ids).to(device)

    # Without a cache every token passes the prompt again, which decides once.

    @property
    def _uncached(self) -> bool:
        return self.cache is None and not torch.is_grad_enabled()  # as `generate` runs, and no training

    @property
    def _rows(self) -> Rows:
        mask = self.attention_mask
        return self.tokens, None if mask is None or mask.dim() != 2 else mask, self.sees

    def _reused(self, call: Call, visible: torch.Tensor) -> LayersKept | None:
        """What was chosen for a prompt that these rows continue, if it would still be chosen."""
        prompt = self.trim.uncached.find(self.images, self._rows) if self._uncached else None
        if prompt is None:
            return None
        same = prompt.rests_on(self._evidence(call, visible, prompt.length))
        if not self.trim.processes.agree(torch.tensor(same, device=call.queries.device)):
            return None
        self.prompt_rows = prompt.length
        return prompt.kept

    def _evidence(self, call: Call, visible: torch.Tensor, rows: int) -> Evidence:
        """What a choice on the first `rows` rests on beside these rows: numbers that change with whatever matters."""
        if self.trim.config.lossless:
            return ()
        scores = saliency(call.queries[:, :, :rows], call.keys, visible[:, :rows], scale=call.scale)
        return tuple(one.to(call.queries.dtype) for one in (scores, call.keys.sum(-1), call.values.sum(-1)))
