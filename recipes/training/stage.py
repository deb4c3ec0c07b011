"""What every stage of training shares: two optimizers, a schedule, progress, and checkpoints to resume from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .muon import Float32Muon
from .settings import Settings

_WARM_UP = 40
_MUON_DECAY = 0.01


class Batches(Dataset[Any]):
    """The batches of a stage by step: each is drawn from its own seed, so a resumed run sees the same ones."""

    def __init__(self, make: Callable[[int], Any], steps: range) -> None:
        self._make, self._steps = make, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> Any:
        return self._make(self._steps[index])


def _is_muon(name: str, parameter: Tensor) -> bool:
    """Muon takes the matrices inside the layers; tables, outputs, gains and gates are AdamW's."""
    return parameter.dim() == 2 and ".layers." in name


def autocast(settings: Settings) -> torch.autocast:
    """Return the context in which layers multiply in the precision that the settings ask for."""
    return torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16")


class Stage:
    """One stage of training: named parameters, their optimizers, the step reached.

    Args:
        name: Names the checkpoint in `folder`.
        folder: Where checkpoints are kept.
        settings: The rates, and how often to keep a checkpoint.
        steps: How many steps to take.
        modules: What to train, by name.
        rate: Factor on the learning rates.
        floor: Where the factor's fall ends; above zero for a stage that the next one continues.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: Settings,
        steps: int,
        modules: dict[str, nn.Module],
        rate: float = 1.0,
        floor: float = 0.0,
    ) -> None:
        self.name, self.steps, self.step, self.seconds = name, steps, 0, 0.0
        self._folder, self._settings, self._every, self._floor = folder, settings, settings.checkpoint_every, floor
        self._parameters = {
            f"{prefix}.{key}": value
            for prefix, module in modules.items()
            for key, value in module.named_parameters()
            if value.requires_grad
        }
        muon = [value for key, value in self._parameters.items() if _is_muon(key, value)]
        adam = [value for key, value in self._parameters.items() if not _is_muon(key, value)]
        kind = Float32Muon if settings.precision == "float32" else torch.optim.Muon
        self._optimizers: list[torch.optim.Optimizer] = [
            kind(muon, lr=settings.muon_rate * rate, weight_decay=_MUON_DECAY),
            torch.optim.AdamW(adam, lr=settings.adam_rate * rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._peaks = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]

    @property
    def finished(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.steps

    def run(self, make: Callable[[int], Any], loss_of: Callable[[Any], tuple[Tensor, dict[str, float]]]) -> None:
        """Train from the step reached to the last, drawing batches in a worker process."""
        self._resume()
        if self.finished:
            return
        loader: Iterable[Any] = DataLoader(
            Batches(make, range(self.step, self.steps)), batch_size=None, num_workers=1, prefetch_factor=4
        )
        begun = time.monotonic()
        bar = tqdm(loader, desc=self.name, initial=self.step, total=self.steps, mininterval=5)
        for batch in bar:
            with autocast(self._settings):
                loss, figures = loss_of(batch)
            self._take_step(loss)
            if self.step % 10 == 0:
                bar.set_postfix({key: f"{value:.3f}" for key, value in figures.items()})
            if self.step % self._every == 0 or self.finished:
                now = time.monotonic()
                self.seconds, begun = self.seconds + now - begun, now
                self._save()

    def _take_step(self, loss: Tensor) -> None:
        # Linear up, then linear down to zero: the way down is where most of the accuracy is gained.
        fall = max((self.steps - self.step) / self.steps * 1.1, self._floor)
        factor = min((self.step + 1) / _WARM_UP, fall, 1.0)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        loss.backward()
        nn.utils.clip_grad_norm_(list(self._parameters.values()), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _save(self) -> None:
        tensors = {f"weights/{key}": value.detach() for key, value in self._parameters.items()}
        for number, optimizer in enumerate(self._optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{index}/{key}": value for key, value in state.items()}
        path = self._folder / f"{self.name}.safetensors"
        fresh = path.with_suffix(".fresh")
        stage = json.dumps({"step": self.step, "steps": self.steps, "seconds": self.seconds})
        metadata = {"stage": stage, "settings": json.dumps(self._settings.to_dict())}
        save_file({key: value.contiguous() for key, value in tensors.items()}, fresh, metadata)
        fresh.replace(path)

    def _resume(self) -> None:
        path = self._folder / f"{self.name}.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if metadata["settings"] != json.dumps(self._settings.to_dict()):
            raise ValueError(f"{path} is of a run with other settings: give this one a folder of its own")
        stage = json.loads(metadata["stage"])
        self.step, self.seconds = stage["step"], stage["seconds"]
        tensors = load_file(path)
        with torch.no_grad():
            for key, value in self._parameters.items():
                value.copy_(tensors[f"weights/{key}"])
        for number, optimizer in enumerate(self._optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer/{number}/"):
                    _, _, index, field = key.split("/")
                    state.setdefault(int(index), {})[field] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
