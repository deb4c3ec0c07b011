"""Suite "layers": time in the cross-attention layers, untrimmed, trimmed the plain way, and by crosstrim."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache

import crosstrim
from crosstrim.bench import shapes
from crosstrim.bench.overhead import inside_hooks
from crosstrim.bench.plain import plainly_trimmed
from crosstrim.bench.timing import Timing, alternate, inside
from crosstrim.models import compat, mllama
from crosstrim.models.names import cache_keyword
from crosstrim.trimming.cache import ImageLayer

Row = dict[str, Any]
Trims = Mapping[str, Mapping[str, Any]]
"""Options of `crosstrim.trim` by the name of the row."""

NARROW = 64
"""Width of the MLPs here, so that a layer's time is its attention's: projections, attention, hooks."""

_HALF, _QUARTER = {"keep=0.5": {"keep": 0.5}}, {"keep=0.25": {"keep": 0.25}}
_ONE = {"one feature": {"keep": 1}}  # what no trimming gets below
_PROMPT = {"dtype": "float32", "phases": ("prefill",), "rows": 256, "warm_up": 0}
_STEP = {"phases": ("decode",), "rows": 8, "copies": 4, "trims": _HALF | _QUARTER}
_ONE_TILE = {"trims": {"lossless": {}}, "tiles": 1}
_UNEQUAL = {"trims": {"lossless": {}}, "tiles": [1, 4, 2, 4], "batch": 4, "copies": 1}
_HERE, _RELEASED = {"dtype": "float32"}, {"dtype": "bfloat16"}  # Llama-3.2-Vision was released in bfloat16

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {
        "shape": "11B",
        "cases": [
            {**_PROMPT, "trims": _HALF | _QUARTER, "rounds": 5},
            {**_HERE, **_STEP, "trims": _HALF | _QUARTER | _ONE, "rounds": 15},
            {**_HERE, **_STEP, **_ONE_TILE, "rounds": 9},
            {**_RELEASED, **_STEP, "trims": _HALF | _QUARTER | _ONE, "rounds": 15},
            {**_RELEASED, **_STEP, **_ONE_TILE, "rounds": 9},
            {**_RELEASED, **_STEP, **_UNEQUAL, "rounds": 9},
        ],
    },
    "quick": {
        "shape": "11B",
        "cases": [
            {**_PROMPT, "trims": _HALF, "rounds": 2, "plain": False},
            {**_HERE, **_STEP, "rounds": 5, "plain": False},
            {**_HERE, **_STEP, **_ONE_TILE, "rounds": 3, "plain": False},
            {**_RELEASED, **_STEP, "trims": _HALF | _QUARTER | _ONE, "rounds": 5, "plain": False},
        ],
    },
    "tiny": {
        "shape": "tiny",
        "cases": [
            {**_PROMPT, "rows": 9, "trims": _HALF | _QUARTER, "rounds": 2},
            {**_HERE, **_STEP, "trims": _HALF | _QUARTER | _ONE, "rounds": 2},
            {**_HERE, **_STEP, **_ONE_TILE, "rounds": 2},
            {**_RELEASED, **_STEP, "trims": _HALF | _QUARTER | _ONE, "rounds": 2},
            {**_RELEASED, **_STEP, **_UNEQUAL, "rounds": 2},
        ],
    },
}


def run(shape: str, cases: list[dict[str, Any]]) -> Iterator[Row]:
    """Measure every case on a leader and two followers.

    Args:
        shape: name of their shape.
        cases: of each the dtype of the weights, and arguments of `measure`.

    Yields:
        The rows of `measure`.
    """
    for dtype, alike in groupby(cases, key=lambda case: case["dtype"]):
        model = shapes.build(shapes.SHAPES[shape], feed_forward=NARROW, dtype=getattr(torch, dtype))
        compat.apply(model)
        for case in alike:
            arguments = {name: value for name, value in case.items() if name != "dtype"}
            yield from measure(model, shapes.SHAPES[shape], **arguments)


@torch.no_grad()
def measure(
    model: nn.Module,
    shape: shapes.Shape,
    *,
    trims: Trims,
    batch: int = 1,
    copies: int = 1,
    rows: int = 256,
    tiles: int | list[int] | None = None,
    rounds: int = 9,
    warm_up: int = 2,
    plain: bool = True,
    phases: tuple[str, ...] = ("prefill", "decode"),
) -> list[Row]:
    """Measure a model's cross-attention layers.

    Args:
        model: of `shapes.build`, repaired, not trimmed.
        shape: of the model.
        trims: what to compare with the untrimmed model.
        batch: samples of the prompt.
        copies: how often each of them stands in the batch of a decoding step.
        rows: T of the prompt.
        tiles: real tiles per image, of all samples or of each.
        rounds: measured runs of each variant.
        warm_up: runs of each that are thrown away first.
        plain: whether to trim the plain way as well.
        phases: "prefill", "decode" or both.

    Returns:
        One row for each phase, trim, way (untrimmed, plain, crosstrim) and layer (leader, followers, all), with
        the time of the layers together, its ratio to the untrimmed one, and the bytes of their cache. Decoding has
        also one for each trim with the layer "hooks": the time of crosstrim's own code in one step of the whole
        model, as a ratio to that of all untrimmed layers.
    """
    inputs = shapes.prompt(shape, batch=batch, rows=rows, tiles=tiles, **_like(model))
    ways = make_ways(model, inputs, trims, plain)
    parts = mllama.locate(model)
    groups = {"leader": parts.cross_layers[:1], "followers": parts.followers}
    found = []
    for phase in phases:
        repeats = copies if phase == "decode" else 1
        caches = {name: prefilled(model, way, inputs, repeats) for name, way in ways.items()}
        held = {name: held_bytes(cache, parts.layer_indices) for name, cache in caches.items()}
        again = repeated(inputs, repeats)
        passes = {name: new_prompt(inputs) if phase == "prefill" else step(again, caches[name]) for name in ways}
        turns = alternate(
            {name: partial(seconds_inside, model, way, groups, passes[name]) for name, way in ways.items()},
            rounds=rounds,
            warm_up=warm_up,
        )
        common = {"phase": phase, "batch": batch * repeats, "rows": rows, "tiles": tiles}
        for layer in (*groups, "all"):
            timings = {name: Timing.of([one[layer] for one in turns[name]]) for name in ways}
            found += [
                common
                | {"layer": layer, "way": way, "trim": trim}
                | compared(timings[way, trim], timings["untrimmed", ""])
                | {
                    "kv_bytes": held[way, trim],
                    "kv_ratio": round(held[way, trim] / held["untrimmed", ""], 4),
                }
                for way, trim in ways
            ]
        if phase == "decode":
            whole = Timing.of([one["all"] for one in turns["untrimmed", ""]])
            for trim, options in trims.items():
                spent = _hook_seconds(model, options, passes["crosstrim", trim], rounds)
                row = common | {"layer": "hooks", "way": "crosstrim", "trim": trim}
                found.append(row | compared(Timing.of(spent), whole))
    return [{"shape": shape.name, **_of(model), **row} for row in found]


Name = tuple[str, str]
Way = Callable[[], contextlib.AbstractContextManager[Any]]


def make_ways(model: nn.Module, inputs: dict[str, torch.Tensor], trims: Trims, plain: bool = True) -> dict[Name, Way]:
    """What puts each variant on the model, by way and trim; the untrimmed one comes first.

    Args:
        model: not trimmed.
        inputs: the prompt, which plain trimming must see beforehand since it scores nothing.
        trims: the variants.
        plain: whether there is plain trimming as well.
    """
    ways: dict[Name, Way] = {("untrimmed", ""): contextlib.nullcontext}
    for name, options in trims.items():
        if plain:
            with crosstrim.trim(model, **options) as trimmed:
                model(**inputs, **{cache_keyword(): new_cache(model)})
                report = trimmed.report()
            ways["plain", name] = partial(plainly_trimmed, model, report)
        ways["crosstrim", name] = partial(crosstrim.trim, model, **options)
    return ways


def prefilled(model: nn.Module, way: Way, inputs: dict[str, torch.Tensor], copies: int = 1) -> DynamicCache:
    """The cache after the prompt, with `copies` of each sample."""
    cache = new_cache(model)
    with way():
        model(**inputs, **{cache_keyword(): cache})
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    return cache


def repeated(inputs: dict[str, torch.Tensor], copies: int) -> dict[str, torch.Tensor]:
    """The prompt's text and mask for `copies` of each sample; features are not needed once they are cached."""
    if copies == 1:
        return inputs
    return {
        name: tensor.repeat_interleave(copies, dim=0)
        for name, tensor in inputs.items()
        if name != "cross_attention_states"
    }


def new_prompt(inputs: dict[str, torch.Tensor]) -> Callable[[], dict[str, Any]]:
    """What makes the arguments of a forward pass of the prompt, with a new cache."""
    return lambda: {**inputs, cache_keyword(): DynamicCache()}


def step(inputs: dict[str, torch.Tensor], cache: DynamicCache) -> Callable[[], dict[str, Any]]:
    """What makes the arguments of a forward pass of one token more."""
    return lambda: {**shapes.next_token(inputs, cache.get_seq_length()), cache_keyword(): cache}


def seconds_inside(
    model: nn.Module,
    way: Way,
    groups: Mapping[str, tuple[nn.Module, ...]],
    arguments: Callable[[], dict[str, Any]],
) -> dict[str, float]:
    """Of one forward pass, the seconds inside each group of layers and inside all of them."""
    with torch.no_grad(), way(), contextlib.ExitStack() as stack:
        watches = {name: stack.enter_context(inside(layers)) for name, layers in groups.items()}
        model(**arguments())
    seconds = {name: watch.seconds for name, watch in watches.items()}
    return seconds | {"all": sum(seconds.values())}


def compared(timing: Timing, untrimmed: Timing) -> Row:
    """A time in milliseconds, and its ratio to the untrimmed one's median."""
    return timing.to_dict() | {"ratio": round(timing.median / untrimmed.median, 4)}


def held_bytes(cache: DynamicCache, indices: tuple[int, ...]) -> int:
    """Bytes that the keys and values take in these layers, however they are held."""
    layers = [cache.layers[index] for index in indices]
    held = [one.held() if isinstance(one, ImageLayer) else [one.keys, one.values] for one in layers]
    return sum(tensor.nbytes for tensors in held for tensor in tensors)


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for this model."""
    return DynamicCache(config=cast(Any, model).config.text_config)


def _like(model: nn.Module) -> dict[str, Any]:
    parameter = next(model.parameters())
    return {"dtype": parameter.dtype, "device": str(parameter.device)}


def _of(model: nn.Module) -> Row:
    like = _like(model)
    return {"dtype": str(like["dtype"]).removeprefix("torch."), "device": like["device"]}


def _hook_seconds(
    model: nn.Module, options: Mapping[str, Any], arguments: Callable[[], dict[str, Any]], rounds: int
) -> list[float]:
    """Seconds inside the hooks of a trim, in each of some forward passes."""
    spent = []
    for _ in range(rounds):
        with inside_hooks(model, crosstrim.trim, **options) as watch:
            model(**arguments())
        spent.append(watch.seconds)
    return spent
