"""Time that can be compared: variants take turns in one process, and medians are reported."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

Name = TypeVar("Name", bound=Hashable)
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Timing:
    """What repeated runs took, in seconds: the median and the span that the middle 60 % lie in."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Of single runs."""
        p20, median, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        return cls(median.item(), p20.item(), p80.item(), len(seconds))

    def to_dict(self) -> dict[str, float]:
        """In milliseconds, rounded to microseconds."""
        milliseconds = {"ms": self.median, "ms_p20": self.p20, "ms_p80": self.p80}
        return {name: round(value * 1e3, 3) for name, value in milliseconds.items()} | {"runs": self.runs}


def alternate(
    variants: Mapping[Name, Callable[[], Measured]], *, rounds: int, warm_up: int = 2
) -> dict[Name, list[Measured]]:
    """Run the variants in turns, so that whatever else the machine does meets them alike.

    Args:
        variants: by name, what runs one of them once and returns what it measured.
        rounds: measured runs of each.
        warm_up: runs of each that are thrown away first.

    Returns:
        By name, what each of its `rounds` runs measured, in their order.
    """
    measured: dict[Name, list[Measured]] = {name: [] for name in variants}
    for turn in range(warm_up + rounds):
        for name, run in variants.items():
            found = run()
            if turn >= warm_up:
                measured[name].append(found)
    return measured


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds that this process spends on `work`, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        begun = time.process_time()
        work()
        return time.process_time() - begun
    finally:
        torch.set_num_threads(threads)


def now(device: torch.device) -> float:
    """Seconds on a clock that stands still until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds spent inside some modules."""

    def __init__(self) -> None:
        self.seconds = 0.0


@contextlib.contextmanager
def inside(modules: Iterable[nn.Module]) -> Iterator[Stopwatch]:
    """Measure the time spent in `modules`, none of which holds another, with every hook they carry already."""
    watch = Stopwatch()

    def enter(module: nn.Module, args: Any) -> None:
        watch.seconds -= now(next(module.parameters()).device)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.seconds += now(next(module.parameters()).device)

    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(enter, prepend=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
