"""The paper's observations on any model and pictures: sparse attention, layers that agree, and KV bytes.

Attention is that of `crosstrim.saliency`: summed over the prompt's text rows that see the picture, per query head, of
the untrimmed model. Every number is taken of one question's visible features first, and then averaged over questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from crosstrim.asking.batches import Encoder
from crosstrim.data.dataset import Dataset, Item
from crosstrim.eval import kv_table, measures, provenance, watch
from crosstrim.eval.items import asked
from crosstrim.memory import ModelShape
from crosstrim.method.selection import select
from crosstrim.models import mllama

FORMAT = 1

MASSES = (0.5, 0.9, 0.99)
"""Shares of the attention of which is told how few features hold them."""

TOPS = (0.25, 0.1, 0.05)
"""Shares of the visible features in the top sets that are compared."""

KS = (0.05, 0.1, 0.25)
"""The `k` at which the first layer's union is held against later layers' attention."""

Progress = Callable[[int, int], None]


def run(
    model: Any,
    processor: Any,
    dataset: Dataset,
    *,
    name: str,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Read the questions' prompts once each, and measure the attention of every cross-attention layer.

    Args:
        model: of `crosstrim.load`, not trimmed.
        processor: of `crosstrim.load`.
        dataset: what to ask; its answers are not looked at.
        name: of the model, for the result.
        batch_size: questions read together, which changes no number.
        progress: called with how many questions are done, and of how many.

    Returns:
        The result as plain JSON types, with everything it depends on: see docs/analysis.md.
    """
    located, encoder, found = mllama.locate(model), Encoder(model, processor), []
    progress(0, len(dataset.items))
    for start in range(0, len(dataset.items), batch_size):
        found += [
            measure(scores) for scores in _attention(located, encoder, dataset.items[start : start + batch_size])
        ]
        progress(len(found), len(dataset.items))
    mean = {key: torch.stack([one[key] for one in found]).mean(0) for key in found[0]}
    shape = mllama.shape_of(located.model.config, name)
    return {
        "format": FORMAT,
        "dataset": provenance.of_dataset(dataset),
        "model": provenance.of_model(model, name),
        "config": {"masses": list(MASSES), "tops": list(TOPS), "ks": list(KS), "batch_size": batch_size},
        **_named(mean, located.layer_indices),
        "memory": kv_table.compute(replace(shape, bytes_per_element=model.dtype.itemsize)),
        **provenance.of_software(model),
    }


def of_shape(shape: ModelShape) -> dict[str, Any]:
    """The part of the result that needs no model: the bytes, and what computed them."""
    return {"format": FORMAT, "config": {}, "memory": kv_table.compute(shape), **provenance.of_software()}


def _attention(located: mllama.Mllama, encoder: Encoder, batch: Sequence[Item]) -> list[torch.Tensor]:
    """Per question, [L, Hq, m]: what every cross-attention layer's heads pay its m visible features."""
    with asked(encoder, batch) as inputs:
        watched = watch.run(located, located.cross_layers, inputs)
    scores, visible = torch.stack(watched.scores, dim=1).cpu(), watched.visible.cpu()
    return [one[..., seen] for one, seen in zip(scores, visible, strict=True)]


def measure(scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """All measures of one question.

    Args:
        scores: [L, Hq, m] saliency of its m visible features, all of one image.

    Returns:
        float64 tensors: `visible` []; `together` [masses, L] and `heads` [masses, L, Hq], see `mass_share`; `chance`
        [tops], `overlap` [tops, L, L] and `rank_correlation` [L, L] of the mean over heads; `kept` [ks] by the first
        layer's union, the attention they hold in each layer, `held` [ks, L], and the most as many features can,
        `most` [ks, L].
    """
    count, mean = scores.shape[-1], scores.double().mean(1)
    everything = torch.ones(1, count, dtype=torch.bool, device=scores.device)
    tops = [int(select(mean[:1].unsqueeze(0), everything, keep=top).sum()) for top in TOPS]
    unions = [select(scores[:1], everything, k=k)[0] for k in KS]
    return {
        "visible": torch.tensor(count, dtype=torch.float64, device=scores.device),
        "together": torch.stack([measures.mass_share(mean, mass) for mass in MASSES]),
        "heads": torch.stack([measures.mass_share(scores, mass) for mass in MASSES]),
        "chance": torch.tensor(tops, dtype=torch.float64, device=scores.device) / count,
        "overlap": torch.stack([measures.overlap(mean, top) for top in TOPS]),
        "rank_correlation": measures.rank_correlation(mean),
        "kept": torch.stack([kept.double().mean() for kept in unions]),
        "held": torch.stack([measures.held_by(mean, kept) for kept in unions]),
        "most": torch.stack([measures.held_by_top(mean, int(kept.sum())) for kept in unions]),
    }


def _named(mean: dict[str, torch.Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """The means as plain JSON types, under the names that docs/analysis.md explains."""
    values = {name: _rounded(tensor.tolist()) for name, tensor in mean.items()}
    later = range(1, len(layers))
    return {
        "layers": list(layers),
        "visible_features": values["visible"],
        "sparsity": [
            {
                "layer": layer,
                "together": {str(mass): values["together"][row][place] for row, mass in enumerate(MASSES)},
                "heads": {str(mass): values["heads"][row][place] for row, mass in enumerate(MASSES)},
            }
            for place, layer in enumerate(layers)
        ],
        "agreement": {
            "chance": {str(top): values["chance"][row] for row, top in enumerate(TOPS)},
            "overlap": {str(top): values["overlap"][row] for row, top in enumerate(TOPS)},
            "rank_correlation": values["rank_correlation"],
        },
        "first_layer": [
            {
                "k": k,
                "kept": values["kept"][row],
                "later": [
                    {"layer": layers[place], "held": values["held"][row][place], "most": values["most"][row][place]}
                    for place in later
                ],
            }
            for row, k in enumerate(KS)
        ],
    }


def _rounded(value: Any) -> Any:
    return [_rounded(one) for one in value] if isinstance(value, list) else round(value, 6)
