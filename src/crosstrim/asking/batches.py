"""Batches of questions whose pictures are encoded once, however many questions and settings read them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from crosstrim.asking import answering
from crosstrim.asking.features import FeatureCache
from crosstrim.models import vision


class Encoder:
    """Makes a model's inputs, and keeps the features of the pictures in case the next batch asks on.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self._processor = processor
        self._cache = FeatureCache()

    @contextlib.contextmanager
    def inputs(
        self,
        pictures: Sequence[str | Sequence[str]],
        questions: Sequence[str],
        opener: Callable[[str], Image.Image],
        max_new_tokens: int = 0,
    ) -> Iterator[Any]:
        """The inputs of a batch, padded on the left; inside the block the model is given its pictures' features.

        Args:
            pictures: one per question, or as many for each, by names that are the same for the same picture.
            questions: what to ask.
            opener: opens a picture by its name.
            max_new_tokens: of the answers that are to follow.

        Raises:
            InputError: a question cannot be asked, or does not fit into the model with its answer.
        """
        samples = [[one] if isinstance(one, str) else one for one in pictures]
        opened = {name: opener(name) for name in dict.fromkeys(name for sample in samples for name in sample)}
        prompts = [
            answering.chat_prompt(self._processor, question, len(sample))
            for question, sample in zip(questions, samples, strict=True)
        ]
        images = [[opened[name] for name in sample] for sample in samples]
        inputs = answering.encode_prompts(self._processor, images, prompts)
        answering.check_inputs(self._model, inputs, max_new_tokens)
        features = self._cache.features(self._model, inputs)
        with vision.given(self._model, features):
            yield inputs.to(self._model.device)
