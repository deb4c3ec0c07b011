"""A batch of prompts makes the host wait for the device once at most, on a device that counts."""

from __future__ import annotations

import pytest
import torch

from crosstrim import TrimConfig
from crosstrim.engines.prompt import Prompt, PromptTrim, cross_attend
from crosstrim.method.geometry import Geometry
from tests.support.watched_device import DEVICE, There, device

IMAGE, TURN = 99, (7, 8)
GEOMETRY = Geometry(features_per_tile=17, tiles_per_image=4, query_heads=4, key_value_heads=2, head_size=8)
HIDDEN = 12

# Ids of the prompt, real tiles of its images, and how many of its rows were generated.
REQUESTS = {
    "one tile": ([1, IMAGE, 3, 4, 5], [1], 0),
    "two tiles, after generated rows": ([IMAGE, 2, 3], [2], 3),
    "four tiles, second turn": ([1, 2, IMAGE, 3, *TURN, 4, 5], [4], 0),
    "two images": ([1, IMAGE, IMAGE, 2, 3], [4, 1], 0),
    "text between": ([IMAGE, 1, 2, IMAGE, 3, 4], [2, 4], 1),
}

POLICIES = ["union", "contribution", "mmr", "dpp", "value", "mean", "random:3", "grid", "mass:0.9"]
KNOWN = [{}, {"keep": 1.0}, *({"policy": name, "keep": keep} for name in POLICIES for keep in (0.3, 20))]
KNOWN += [{"keep": 20, "rating_rows": "last_turn"}]
DECIDED_BY_PROMPTS = [{"policy": name, "k": 0.1} for name in POLICIES] + [{"policy": "mass:0.9"}]
DECIDED_BY_PROMPTS += [{"k": 0.1, "k_base": "all"}]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def answer(options: dict, place: torch.device, retained: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Two cross-attention layers for a batch: what every prompt keeps, and all that the layers give back."""
    trim = PromptTrim(TrimConfig(**options), GEOMETRY, IMAGE, TURN)
    prompts, start = [], 1  # a row of a request without an image comes first
    for number, (ids, tiles, generated) in enumerate(REQUESTS.values()):
        features = random(len(tiles) * GEOMETRY.features_per_image + number, HIDDEN).to(place)
        rows = slice(start, start := start + len(ids) + generated)
        prompts.append(Prompt(trim, ids, tiles, rows, features))
    weights = random(2, HIDDEN, GEOMETRY.key_value_heads * GEOMETRY.head_size).to(place)

    def project(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = ((features @ one).unflatten(-1, (GEOMETRY.key_value_heads, -1)) for one in weights)
        return keys, values

    queries = random(start, GEOMETRY.query_heads, GEOMETRY.head_size).to(place)
    prompts[1].kept = retained
    leader = [*cross_attend(prompts, queries, project, lambda heads: heads)]
    follower = [*cross_attend(prompts, queries, project)]
    sees = [prompt.sees for prompt in prompts]
    return [*(prompt.kept for prompt in prompts), *sees, *(part for one in leader + follower for part in one)]


def on_both(options: dict) -> tuple[list[str], list[torch.Tensor], list[torch.Tensor]]:
    with torch.inference_mode():
        expected = answer(options, torch.device("cpu"))
    with device() as looks:
        found = answer(options, DEVICE)
    assert all(isinstance(one, There) for one in found)
    return looks, [one.values for one in found], expected


@pytest.mark.parametrize("options", KNOWN, ids=str)
def test_nobody_looks_where_the_budget_says_how_much_stays(options):
    looks, found, expected = on_both(options)
    assert looks == []
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("options", DECIDED_BY_PROMPTS, ids=str)
def test_the_counts_of_a_batch_come_together(options):
    looks, found, expected = on_both(options)
    assert looks == ["tolist"]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("options", [{"keep": 20}, {"k": 0.1}], ids=str)
def test_a_request_that_lost_its_memory_keeps_what_it_kept(options):
    before = answer(options, torch.device("cpu"))
    again = answer(options, torch.device("cpu"), before[1] - before[1].min())
    assert torch.equal(again[1], before[1] - before[1].min())
    assert all(torch.equal(again[place], before[place]) for place in (0, 2, 3, 4))


LOOKS = {
    "an item": lambda one: one.sum().item(),
    "a number": lambda one: int(one.sum()),
    "a yes": lambda one: bool(one.any()),
    "a list": lambda one: one.tolist(),
    "a copy": lambda one: one.cpu(),
    "a copy, not waited for": lambda one: one.to("cpu", non_blocking=True),
    "a copy in place": lambda one: torch.empty(6).copy_(one),
    "places": lambda one: one.nonzero(),
    "places by where": lambda one: torch.where(one > 2),
    "a mask": lambda one: one[one > 2],
    "a mask to write by": lambda one: one.index_put_((one > 2,), 2 * one[:3]),
    "a masked selection": lambda one: one.masked_select(one > 2),
    "different values": lambda one: one.unique(),
    "a comparison": lambda one: torch.equal(one, one),
    "a length": lambda one: one[: one.sum().long()],
}


@pytest.mark.parametrize("name", LOOKS)
def test_the_device_counts(name):
    with device() as looks:
        one = torch.arange(6.0).to(DEVICE)
        one = one[torch.tensor([5, 0, 1, 2, 3, 4]).to(DEVICE)] * 2 / 2
        one[:2] += one.argsort(stable=True)[:2].to(one.dtype)
        assert looks == []
        LOOKS[name](one)
    assert len(looks) == 1
