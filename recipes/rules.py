"""Rules that were tried beside the shipped ones: `python -m recipes.rules`.

Which features stay could be decided otherwise, later layers could decide for themselves, and what is dropped could be
merged otherwise. Each such rule answers mini's validation questions, which no published number rests on, beside the
shipped rule with the same bytes of cache. Writes evaluation/results/mini-rules.json.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from recipes import calibration
from recipes.layers import emulated, merged_leader
from recipes.mini.heldout import write_benchmark

import crosstrim
from crosstrim import TrimConfig
from crosstrim.asking import answering
from crosstrim.asking.batches import Encoder
from crosstrim.data import dataset
from crosstrim.data.dataset import Dataset
from crosstrim.eval import metrics, provenance
from crosstrim.eval.items import asked
from crosstrim.files import write_json
from crosstrim.method import choose, policies
from crosstrim.method.merge import Counts, Groups, groups_of
from crosstrim.method.policy import Evidence

OUT = calibration.RESULTS / "mini-rules.json"

PICTURES = 96
KEEPS = (0.05, 0.1)
TOKENS = 12
BATCH = 64

Way = Callable[[Any, float], AbstractContextManager[TrimConfig | None]]
"""From a model and a budget to a block in which the model answers by a rule, under the trim that it gives, if any."""


# Which features stay: policies.


def class_tokens_first(evidence: Evidence) -> torch.Tensor:
    """Contribution, but the class token of every tile stays before anything else."""
    votes = policies.Contribution()(evidence)
    class_token = torch.arange(votes.shape[-1]) % evidence.features_per_tile == 0
    return votes + votes.shape[-1] * 2 * class_token


def entropy_weighted(evidence: Evidence) -> torch.Tensor:
    """Contribution, where a head weighs as much as its attention is sharper than even."""
    shares = evidence.saliency / evidence.saliency.sum(-1, keepdim=True).clamp_min(1e-30)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1, keepdim=True)
    even = evidence.visible.sum(-1)[:, None, None].clamp_min(2).float().log()
    return policies.Contribution()(replace(evidence, saliency=evidence.saliency * (1 - entropy / even)))


def spread(evidence: Evidence) -> torch.Tensor:
    """Maximal marginal relevance of what features add, where the redundant ones are those that lie side by side."""
    side = int((evidence.features_per_tile - 1) ** 0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    points = torch.stack([rows, columns], -1).view(-1, 2).float()
    near = torch.exp(-torch.cdist(points, points).square() / 4)  # as wide as a digit
    tile = torch.block_diag(torch.ones(1, 1), near)
    where = torch.block_diag(*[tile] * (evidence.visible.shape[1] // len(tile)))
    added = replace(
        evidence, saliency=policies.Value()(evidence), keys=where.expand(len(evidence.visible), 1, -1, -1)
    )
    return policies.MaximalMarginalRelevance()(added)


def half_grid(evidence: Evidence) -> torch.Tensor:
    """In turn the heads' next best feature and the next of an even grid."""
    union = evidence.saliency.argsort(dim=-1, descending=True, stable=True).argsort(-1).amin(1)
    ours, grid = (
        votes.masked_fill(~evidence.visible, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        for votes in (-union.float(), policies.Grid()(evidence)[:, 0].float())
    )
    return -torch.minimum(2 * ours, 2 * grid + 1).float().unsqueeze(1)


def largest_row(
    queries: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    *,
    rating_rows: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """What `crosstrim.saliency` takes and gives, but the largest attention of any row in place of the sum."""
    visible = visible.repeat_interleave(keys.shape[2] // visible.shape[2], dim=-1)
    heads = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = queries @ heads.transpose(2, 3) * (queries.shape[-1] ** -0.5 if scale is None else scale)
    counts = (visible & rating_rows.unsqueeze(-1)).unsqueeze(1)
    return logits.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1).where(counts, 0.0).amax(2)


# What becomes of the others: groups.


def by_values(choice: choose.Choice, kept: torch.Tensor, counts: Counts | None = None) -> Groups:
    """Groups by the cosine of the leader's values."""
    seen = choice.evidence
    return groups_of(seen.values, seen.saliency, choice.visible, kept, seen.features_per_image, counts)


def summary(choice: choose.Choice, kept: torch.Tensor, counts: Counts | None = None) -> Groups:
    """One group for all: the kept feature with the fewest votes stands for itself and whatever was dropped."""
    groups, size = Groups.singles(kept), choice.evidence.features_per_image
    last = choice.votes.amax(1).masked_fill(~kept, torch.inf).unflatten(1, (-1, size)).argmin(-1, keepdim=True)
    last = (last + torch.arange(last.shape[1]).view(1, -1, 1) * size).expand(-1, -1, size).flatten(1)
    into = torch.where(choice.visible & ~kept, last, groups.into)
    return Groups.of(into, choice.evidence.saliency.sum(1))


@contextmanager
def by_features(model: Any, keep: float) -> Iterator[TrimConfig]:
    """Merging by the cosine of the vision tower's features."""
    seen: list[torch.Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("cross_attention_states")
        if states is not None:
            seen[:] = [states]

    def groups(choice: choose.Choice, kept: torch.Tensor, counts: Counts | None = None) -> Groups:
        features = seen[0].reshape(len(kept), 1, kept.shape[1], -1)
        size = choice.evidence.features_per_image
        return groups_of(features, choice.evidence.saliency, choice.visible, kept, size, counts)

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with merged(groups)(model, keep) as config:
            yield config
    finally:
        hook.remove()


def shipped(policy: Any = "contribution", **options: Any) -> Way:
    """A rule that a trim can be told."""
    return lambda model, keep: nullcontext(TrimConfig(policy=policy, keep=keep, **options))


@contextmanager
def _patched(thing: Any, name: str, value: Any, config: TrimConfig) -> Iterator[TrimConfig]:
    with patch.object(thing, name, value):
        yield config


def merged(groups: Callable[..., Groups]) -> Way:
    """Merging into other groups than the shipped ones."""
    return lambda model, keep: _patched(
        choose.Choice, "groups", groups, TrimConfig(policy="contribution", keep=keep, merge=True)
    )


def without_bias() -> Way:
    """Merging, but a mean draws no more attention than one feature."""
    nothing = lambda self, slots: torch.zeros(slots.shape)  # noqa: E731
    return lambda model, keep: _patched(
        Groups, "bias", nothing, TrimConfig(policy="contribution", keep=keep, merge=True)
    )


WAYS: dict[str, Way] = {
    "contribution": shipped(),
    "contribution, merged": shipped(merge=True),
    "union": shipped("union"),
    "class tokens first": shipped(class_tokens_first),
    "largest row": lambda model, keep: _patched(
        choose, "saliency", largest_row, TrimConfig(policy="contribution", keep=keep)
    ),
    "heads by entropy": shipped(entropy_weighted),
    "spread over the picture": shipped(spread),
    "half union, half grid": shipped(half_grid),
    "summary of the dropped": merged(summary),
    "merged by values": merged(by_values),
    "merged by features": by_features,
    "merged without bias": without_bias(),
    "merged in the first layer too": merged_leader,
    "first layer": partial(emulated, choosing="first", whole=False),
    "first layer, read whole": partial(emulated, choosing="first", whole=True),
    "each layer, read whole": partial(emulated, choosing="each", whole=True),
    "each layer": partial(emulated, choosing="each", whole=False),
    "each layer, of twice the first": partial(emulated, choosing="within", whole=True),
}
"""Others are compared with the first. "first layer" is the same by other means, which shows that these work."""


def answers(model: Any, processor: Any, questions: Dataset) -> dict[str, list[str]]:
    """By label, each rule's answers; first the untrimmed model's."""
    encoder = Encoder(model, processor)
    found: dict[str, list[str]] = {"untrimmed": []}
    for first in range(0, len(questions.items), BATCH):
        with asked(encoder, questions.items[first : first + BATCH], TOKENS) as inputs:
            give = partial(answering.generate, model, processor, inputs, max_new_tokens=TOKENS)
            found["untrimmed"] += give(config=None).texts
            for name, way in WAYS.items():
                for keep in KEEPS:
                    with way(model, keep) as config:
                        found.setdefault(f"{name} keep={keep}", []).extend(give(config=config).texts)
        print(f"{first + BATCH} of {len(questions.items)}", file=sys.stderr)
    return found


def compute() -> dict[str, Any]:
    """The result as plain JSON types."""
    model, processor = crosstrim.load("mini")
    with tempfile.TemporaryDirectory() as folder:
        questions = replace(
            dataset.read(write_benchmark(Path(folder), "validation", PICTURES)), name="mini-validation"
        )
        found = answers(model, processor, questions)
    right = {
        label: torch.tensor(
            [metrics.is_right(text, item.answers) for text, item in zip(texts, questions.items, strict=True)]
        )
        for label, texts in found.items()
    }
    rows = []
    for name in WAYS:
        for keep in KEEPS:
            label, beside = f"{name} keep={keep}", f"{next(iter(WAYS))} keep={keep}"
            gain = right[label].double() - right[beside].double()
            unchanged = [one == other for one, other in zip(found[label], found["untrimmed"], strict=True)]
            rows.append(
                {
                    "rule": name,
                    "keep": keep,
                    "right": float(right[label].double().mean()),
                    "unchanged": sum(unchanged) / len(unchanged),
                    "gain": float(gain.mean()),
                    "gain_error": float(gain.std() / len(gain) ** 0.5),
                }
            )
    return {
        "format": 1,
        "dataset": provenance.of_dataset(questions),
        "model": provenance.of_model(model, "mini"),
        "config": {"keeps": KEEPS, "max_new_tokens": TOKENS, "batch_size": BATCH},
        "untrimmed": float(right["untrimmed"].double().mean()),
        "rows": rows,
        "predictions": found,
        **provenance.of_software(model),
    }


if __name__ == "__main__":
    write_json(OUT, compute())
