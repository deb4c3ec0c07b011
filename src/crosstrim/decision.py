"""What stays of the images that one forward pass brings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from crosstrim import policies
from crosstrim.config import TrimConfig
from crosstrim.errors import InputError
from crosstrim.forward import ForwardPass
from crosstrim.models import mllama, parallel
from crosstrim.rating import saliency
from crosstrim.rows import last_turn_rows, real_rows
from crosstrim.selection import budget_of, select, share_of
from crosstrim.state import LayerStates, TrimState


class Decision:
    """Score, vote, select: the options of a trim applied to one forward pass.

    Args:
        config: the options.
        model: where the leader is.
    """

    def __init__(self, config: TrimConfig, model: mllama.Mllama) -> None:
        self._config = config
        self._model = model
        self._ranks = parallel.ranks(model)
        self._policy = config.voters()
        self._knobs: dict[str, Any] = {"k": config.k, "keep": config.keep, "k_base": config.k_base}

    def lossless(self, step: ForwardPass, new_count: int, blind_rows_leak: bool) -> LayerStates:
        """Everything that some row may see stays, in every layer.

        Args:
            step: the pass, with `visible`.
            new_count: features the pass brings, the last ones of `visible`.
            blind_rows_leak: whether rows that see nothing attend to everything all the same. Then a sample that
                sees nothing keeps everything, since dropping anything would show.
        """
        real = self._real_rows(step)
        real[:, -1] = True  # generated tokens see what the last row sees, though it may be padding
        visible = self._visible(step, new_count, real)
        blind = ~visible.any(-1, keepdim=True) | ~step.visible[:, -1].any(-1, keepdim=True)
        kept = visible | blind if blind_rows_leak else visible
        return (TrimState.of(kept, visible, self._model.features_per_image),) * len(self._model.cross_layers)

    def scored(self, step: ForwardPass, new_count: int, older_keys: torch.Tensor | None) -> LayerStates:
        """What the policy picks on the leader's attention, layer by layer.

        Args:
            step: the pass, with `queries`, `keys` and `visible`.
            new_count: features the pass brings.
            older_keys: [B, Hkv, N old, D], the leader's keys of earlier images; they share the softmax.
        """
        step.visible = step.visible.to(step.queries.device)  # masks come on the device of the layer before
        real = self._real_rows(step)
        visible = self._visible(step, new_count, real)
        keys = step.keys
        if older_keys is not None:
            keys = torch.cat([older_keys.to(keys.device), keys], dim=2)
        scores = saliency(
            step.queries,
            keys,
            step.visible,
            rating_rows=real & self._turn_rows(step),
            scale=mllama.attention_scale(self._model.leader),
        )
        evidence = policies.Evidence(
            saliency=scores[..., -new_count:],
            visible=visible,
            keys=step.keys,
            values=step.values.reshape(*step.keys.transpose(1, 2).shape[:3], -1).transpose(1, 2),
            budget=budget_of(visible.unflatten(-1, (-1, self._model.features_per_image)), **self._knobs),
            features_per_image=self._model.features_per_image,
            features_per_tile=self._model.features_per_tile,
        )
        votes, kept = self._vote(evidence if self._ranks is None else _of_all_heads(evidence, self._ranks))
        if self._ranks is not None:
            votes, kept = self._ranks.agree(votes), self._ranks.agree(kept)
        return self._layer_states(votes, visible, kept)

    def _vote(self, evidence: policies.Evidence) -> tuple[torch.Tensor, torch.Tensor]:
        votes = votes_of(self._policy, evidence)
        if self._config.k is None and self._config.keep is None:
            return votes, chosen_by(self._policy, evidence)
        size = self._model.features_per_image
        return votes, select(votes, evidence.visible, features_per_image=size, **self._knobs)

    def _layer_states(self, votes: torch.Tensor, visible: torch.Tensor, kept: torch.Tensor) -> LayerStates:
        """The choice for the leader, and for every follower all or a share of it."""
        size, most = self._model.features_per_image, self._most_kept(visible.shape[1])
        whole = TrimState.of(kept, visible, size, at_most=most)
        followers = len(self._model.followers)
        if not hasattr(self._policy, "shares"):
            return (whole,) * (1 + followers)
        states = [whole]
        for share in self._policy.shares(followers):
            fewer = select(votes, kept, keep=share, features_per_image=size)
            at_most = int(share_of(share, torch.tensor(most, device="cpu")))
            states.append(whole if share == 1 else TrimState.of(fewer, visible, size, at_most=at_most))
        return tuple(states)

    def _visible(self, step: ForwardPass, new_count: int, real: torch.Tensor) -> torch.Tensor:
        return (step.visible[..., -new_count:] & real.unsqueeze(-1)).any(1)

    def _real_rows(self, step: ForwardPass) -> torch.Tensor:
        batch, rows = step.visible.shape[:2]
        real = real_rows(step.attention_mask, batch, rows, step.visible.device, step.past)
        return real & (torch.arange(rows, device=real.device) < rows - step.continuation)

    def _turn_rows(self, step: ForwardPass) -> torch.Tensor:
        if self._config.rating_rows == "all":
            return torch.ones((), dtype=torch.bool, device=step.visible.device)
        if step.tokens.is_floating_point():
            raise InputError(
                'rating_rows="last_turn" needs input_ids to find the turn, but inputs_embeds were given; '
                'pass input_ids or use rating_rows="all".'
            )
        turn_ids = self._config.user_turn_ids or self._model.user_turn_ids
        return last_turn_rows(step.tokens, self._model.image_token_id, turn_ids).to(step.visible.device)

    def _most_kept(self, new_count: int) -> int:
        """An upper bound on the features of `new_count` that a budget keeps, known without counting."""
        size, keep = self._model.features_per_image, self._config.keep
        if keep is None:
            return new_count
        per_image = int(budget_of(torch.ones(size, dtype=torch.bool, device="cpu"), keep=keep))
        return per_image * (new_count // size)


def _of_all_heads(evidence: policies.Evidence, ranks: parallel.Ranks) -> policies.Evidence:
    """The evidence of every process that holds some of the heads, so that each decides as one process would."""
    return replace(
        evidence,
        saliency=ranks.gather_heads(evidence.saliency),
        keys=ranks.gather_heads(evidence.keys),
        values=ranks.gather_heads(evidence.values),
    )


def votes_of(policy: policies.Policy, evidence: policies.Evidence) -> torch.Tensor:
    """The policy's votes [B, V, N].

    Raises:
        InputError: it returned something else.
    """
    votes = policy(evidence)
    batch, features = evidence.visible.shape
    is_tensor = isinstance(votes, torch.Tensor)
    if not is_tensor or votes.dim() != 3 or votes.shape[::2] != (batch, features) or not votes.shape[1]:
        raise _returned(policy, votes, f"votes must be a tensor [{batch}, at least 1 voter, {features}]")
    return votes


def chosen_by(policy: policies.Policy, evidence: policies.Evidence) -> torch.Tensor:
    """The visible features [B, N] that a policy with a method `chosen` picks without any budget.

    Raises:
        InputError: it returned something else.
    """
    chosen = policy.chosen(evidence)  # type: ignore[attr-defined]  # the caller knows that it is there
    if not isinstance(chosen, torch.Tensor) or (chosen.shape, chosen.dtype) != (evidence.visible.shape, torch.bool):
        raise _returned(policy, chosen, f"what is chosen must be a bool tensor {list(evidence.visible.shape)}")
    return chosen & evidence.visible.to(chosen.device)


def _returned(policy: policies.Policy, what: object, wanted: str) -> InputError:
    met = f"{what.dtype} {list(what.shape)}" if isinstance(what, torch.Tensor) else repr(what)
    return InputError(f"policy {policies.name_of(policy)} returned {met}, but {wanted}.")
