"""Batches of questions whose pictures are encoded once, however many questions and settings read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from crosstrim.asking import answering
from crosstrim.asking.features import Digests, FeatureCache
from crosstrim.asking.inputs import Inputs


class Encoder:
    """Makes a model's inputs, and keeps the features of the pictures in case the next batch asks on.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        max_bytes: of features that are kept; None is what `FeatureCache` keeps.

    Attributes:
        cache: where the features are.
    """

    def __init__(self, model: Any, processor: Any, max_bytes: int | None = None) -> None:
        self._model = model
        self._processor = processor
        self.cache = FeatureCache() if max_bytes is None else FeatureCache(max_bytes)

    def asked(
        self, pictures: Sequence[Sequence[Image.Image]], questions: Sequence[str], max_new_tokens: int = 0
    ) -> contextlib.AbstractContextManager[Inputs]:
        """`inputs` of one question about some pictures each, in the chat template's words.

        Raises:
            InputError: a question cannot be asked; inside, as `inputs`.
        """
        prompts = [
            answering.chat_prompt(self._processor, question, len(sample))
            for question, sample in zip(questions, pictures, strict=True)
        ]
        return self.inputs(pictures, prompts, max_new_tokens)

    @contextlib.contextmanager
    def inputs(
        self,
        pictures: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        max_new_tokens: int = 0,
        digests: Digests | None = None,
    ) -> Iterator[Inputs]:
        """The inputs of a batch, padded on the left; inside the block the model is given its pictures' features.

        Args:
            pictures: per sample its pictures, as many for each.
            prompts: that the chat template has written.
            max_new_tokens: of the answers that are to follow.
            digests: what tells the pictures apart, when it is known already.

        Raises:
            InputError: a prompt does not fit into the model with its answer.
        """
        inputs = answering.encode_prompts(self._processor, pictures, prompts)
        answering.check_inputs(self._model, inputs, max_new_tokens)
        features = self.cache.features(self._model, inputs, digests) if any(pictures) else None
        with Inputs(inputs.to(self._model.device), features).given(self._model) as given:
            yield given
