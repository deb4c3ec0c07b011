"""What was kept and what it saved, as numbers for programs and as a table for people."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from crosstrim.config import TrimConfig
from crosstrim.models import names
from crosstrim.trimming.kept import Kept, LayersKept

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ImageReport:
    """What one image of one sample was trimmed to.

    Attributes:
        features: features the image occupies, padding tiles included.
        visible: features that some text row may see.
        kept: features that stayed.
        kept_indices: which ones, counted through all images of the prompt in (image, tile, feature) order.
        layers: features that each cross-attention layer keeps of them, the first layer first; they differ where a
            policy makes later layers read less.
        group_sizes: of each feature that the first of the later layers keeps, how many of the visible ones it stands
            for, itself included; None where nothing was merged.
        held: share of the first cross-attention layer's attention to the image, all heads and rating rows together,
            that the kept features draw. None where it was not asked for, where no row rated, and for images that
            joined the conversation later.
    """

    features: int
    visible: int
    kept: int
    kept_indices: tuple[int, ...] = field(repr=False)
    layers: tuple[int, ...]
    group_sizes: tuple[int, ...] | None = field(default=None, repr=False)
    held: float | None = None

    @property
    def merged(self) -> int:
        """Features that were not kept, and that kept ones stand for."""
        return sum(size - 1 for size in self.group_sizes or ())

    @property
    def kept_fraction(self) -> float:
        """Kept features as a share of the visible ones, mean over the layers."""
        return sum(self.layers) / len(self.layers) / self.visible


@dataclass(frozen=True)
class TrimReport:
    """What one generation was trimmed to.

    Attributes:
        samples: per sample, its images; an image slot that a sample does not use is left out.
        kv_bytes: bytes of image keys and values that all cross-attention layers hold, read off the tensors.
        kv_bytes_untrimmed: bytes the untrimmed model would hold for them.
        config: the trimming options.
        versions: of crosstrim, transformers, torch and Python, and the device.
        compat: which repairs of transformers were on.
    """

    samples: tuple[tuple[ImageReport, ...], ...]
    kv_bytes: int
    kv_bytes_untrimmed: int
    config: TrimConfig
    versions: dict[str, str]
    compat: dict[str, bool]

    @property
    def visible(self) -> int:
        """Visible features of all samples and images."""
        return sum(image.visible for sample in self.samples for image in sample)

    @property
    def kept(self) -> int:
        """Kept features of all samples and images."""
        return sum(image.kept for sample in self.samples for image in sample)

    @property
    def kept_fraction(self) -> float:
        """Kept features as a share of the visible ones, mean over the layers; 1.0 when there were none."""
        kept = sum(image.kept_fraction * image.visible for sample in self.samples for image in sample)
        return kept / self.visible if self.visible else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "samples": [
                {
                    "images": [
                        {
                            "features": image.features,
                            "visible": image.visible,
                            "kept": image.kept,
                            "kept_indices": list(image.kept_indices),
                            "layers": list(image.layers),
                            "merged": image.merged,
                            **({} if image.held is None else {"held": round(image.held, 6)}),
                        }
                        for image in sample
                    ]
                }
                for sample in self.samples
            ],
            "kv_bytes": self.kv_bytes,
            "kv_bytes_untrimmed": self.kv_bytes_untrimmed,
            "config": self.config.to_dict(),
            "versions": self.versions,
            "compat": self.compat,
        }

    def table(self) -> Table:
        """The report as a rich table, one line per image."""
        from rich.table import Table

        table = Table(title=f"image KV {format_bytes(self.kv_bytes_untrimmed)} -> {format_bytes(self.kv_bytes)}")
        for column in ("sample", "image", "features", "visible", "kept", "kept of visible"):
            table.add_column(column, justify="right")
        for sample_index, sample in enumerate(self.samples):
            for image_index, image in enumerate(sample):
                fraction = f"{image.kept / image.visible:.1%}" if image.visible else "-"
                numbers = (sample_index, image_index, image.features, image.visible, image.kept)
                table.add_row(*map(str, numbers), fraction)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        kept = f"kept {self.kept} of {self.visible} visible image features ({self.kept_fraction:.1%})"
        return f"{kept}, image KV {format_bytes(self.kv_bytes_untrimmed)} -> {format_bytes(self.kv_bytes)}"


def image_reports(states: LayersKept, size: int, held: bool = False) -> tuple[tuple[ImageReport, ...], ...]:
    """Per sample and image of `size` features, what `states` keep; slots of which nothing is visible are left out."""
    visible, kept = (tensor.cpu().unflatten(1, (-1, size)) for tensor in (states[0].visible, states[0].kept))
    seen, layers = visible.sum(-1), torch.stack([state.kept.unflatten(1, (-1, size)).sum(-1) for state in states], -1)
    return tuple(
        tuple(
            ImageReport(
                features=size,
                visible=int(seen[sample, image]),
                kept=int(kept[sample, image].sum()),
                kept_indices=tuple((kept[sample, image].nonzero().squeeze(-1) + image * size).tolist()),
                layers=tuple(layers[sample, image].tolist()),
                group_sizes=_group_sizes(states[1], sample, image, size) if states[1:] else None,
                held=_held(states[0], sample, image, size) if held else None,
            )
            for image in range(visible.shape[1])
            if seen[sample, image]
        )
        for sample in range(visible.shape[0])
    )


def _group_sizes(follower: Kept, sample: int, image: int, size: int) -> tuple[int, ...] | None:
    if follower.groups is None:
        return None
    here = slice(image * size, (image + 1) * size)
    stays = follower.kept[sample, here].cpu()
    return tuple(follower.groups.sizes[sample, here].cpu()[stays].tolist())


def _held(leader: Kept, sample: int, image: int, size: int) -> float | None:
    here = slice(image * size, (image + 1) * size)
    stays, seen = leader.kept[sample, here], leader.visible[sample, here]
    if torch.equal(stays, seen):
        return 1.0
    if leader.drew is None or here.stop > leader.drew.shape[-1]:
        return None
    drew = leader.drew[sample, :, here].double().sum(0)
    return float(drew[stays].sum() / drew.sum()) if drew.any() else None


def versions(device: str) -> dict[str, str]:
    """Versions of what a number depends on, for every result that is written down."""
    import crosstrim

    return {
        "crosstrim": crosstrim.__version__,
        "transformers": names.transformers_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def format_bytes(count: int) -> str:
    """A size for people: binary units, three digits."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    # From 999.5 on, three digits would turn into 1e+03.
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 100 else f"{size:.3g} {units[0]}"
