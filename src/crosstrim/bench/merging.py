"""Suite "merge": what folding dropped features into kept ones costs a prompt, against what dropping them saves it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from crosstrim.bench import shapes
from crosstrim.bench.timing import Timing, alternate, cpu_seconds
from crosstrim.method.merge import groups_of

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"shape": "11B", "keep": 1601, "rounds": 5},
    "quick": {"shape": "11B", "keep": 1601, "rounds": 1},
    "tiny": {"shape": "tiny", "keep": 17, "rounds": 2},
}


@torch.no_grad()
def run(shape: str, keep: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure both by turns, on one core, for one picture of four tiles, in float32.

    Args:
        shape: name of the shape of the cross-attention layers.
        keep: features that stay, spread evenly.
        rounds: measured runs of each.

    Yields:
        The CPU time of making the groups and their means, and that of one later layer's keys and values of as many
        features as are dropped. `ratio` is to the latter in all of the later layers.
    """
    sizes = shapes.SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    count, key_size = sizes.features_per_image, sizes.key_value_heads * sizes.head_size
    features = draw(1, count, sizes.hidden)
    keys = draw(1, sizes.key_value_heads, count, sizes.head_size)
    saliency = draw(1, sizes.query_heads, count).softmax(-1)
    weights = [draw(key_size, sizes.hidden) for _ in ("keys", "values")]
    visible = torch.ones(1, count, dtype=torch.bool)
    kept = torch.zeros_like(visible)
    slots = torch.arange(keep).unsqueeze(0) * count // keep
    kept[0, slots] = True

    def merge() -> None:
        groups_of(keys, saliency, visible, kept, count).means(features, slots)

    def project() -> None:
        for weight in weights:
            torch.nn.functional.linear(features[:, keep:], weight)

    ways = {"merge": partial(cpu_seconds, merge), "project": partial(cpu_seconds, project)}
    found = {way: Timing.of(seconds) for way, seconds in alternate(ways, rounds=rounds, warm_up=1).items()}
    layers = sizes.cross_layers - 1
    for way, timing in found.items():
        common = {"what": way, "shape": shape, "kept": keep, "of": count, "layers": layers}
        ratio = timing.median / max(found["project"].median * layers, 1e-9)
        yield common | timing.to_dict() | {"ratio": round(ratio, 4)}
