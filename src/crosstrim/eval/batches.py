"""Batches of questions whose pictures are encoded once, however many questions and settings read them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from crosstrim import answering
from crosstrim.models import vision


class Encoder:
    """Makes a model's inputs, and keeps the features of a batch's pictures in case the next batch asks on.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self._processor = processor
        self._features: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def inputs(
        self, pictures: Sequence[str], questions: Sequence[str], opener: Callable[[str], Image.Image]
    ) -> Iterator[Any]:
        """The inputs of a batch, padded on the left; inside the block the model is given its pictures' features.

        Args:
            pictures: one per question, by names that are the same for the same picture.
            questions: what to ask.
            opener: opens a picture by its name.
        """
        opened = {name: opener(name) for name in dict.fromkeys(pictures)}
        inputs = answering.encode(self._processor, [opened[name] for name in pictures], questions)
        inputs = inputs.to(self._model.device)
        self._features = {name: one for name, one in self._features.items() if name in opened}
        new = [name for name in opened if name not in self._features]
        if new:
            rows = torch.tensor([pictures.index(name) for name in new], device=self._model.device)
            names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
            features = vision.encode(self._model, {name: inputs[name][rows] for name in names})
            self._features.update(zip(new, features, strict=True))
        with vision.given(self._model, torch.stack([self._features[name] for name in pictures])):
            yield inputs
