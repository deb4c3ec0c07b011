"""What an answer costs, from the model's configuration: bytes of image KV and floating-point operations. Computed.

The vision tower is left out: it runs once, however often an answer is made from its features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosstrim.asking import answering
from crosstrim.data.dataset import Dataset
from crosstrim.memory import ModelShape, image_kv_bytes
from crosstrim.models import mllama


@dataclass(frozen=True)
class Costs:
    """The numbers of a model on which an answer's cost depends.

    Attributes:
        shape: of the model.
        token_parameters: weights of the decoder that every token is multiplied with.
    """

    shape: ModelShape
    token_parameters: int

    @classmethod
    def of(cls, model: Any) -> Costs:
        """Those of a loaded Mllama."""
        config = mllama.locate(model).model.config
        return cls(mllama.shape_of(config, "model"), mllama.token_parameters(config))

    def kv_bytes(self, kept: float) -> float:
        """Bytes that the keys and values of `kept` features take in all cross-attention layers."""
        return kept * image_kv_bytes(self.shape, 1)

    def flops(self, kept: float, prompt: float, tokens: float) -> float:
        """Operations of a prompt and its answer, two a multiplication and addition.

        Weights times tokens, keys and values of the features (all of them in the first cross-attention layer), and
        attention to features and to text.

        Args:
            kept: features that the later layers read.
            prompt: tokens.
            tokens: of the answer.
        """
        shape, rows = self.shape, prompt + tokens
        whole, followers = shape.features_per_image, shape.cross_layers - 1
        dense = 2.0 * self.token_parameters * rows
        per_feature = 2 * shape.hidden_size * 2 * shape.key_value_heads * shape.head_size
        projected = per_feature * (whole + followers * kept)
        per_pair = 4 * shape.query_heads * shape.head_size
        read = per_pair * (rows * followers * kept + prompt * whole + tokens * kept)
        said = per_pair * shape.self_layers * rows * (rows + 1) / 2
        return dense + projected + read + said


class Prices:
    """What answers to some questions cost.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        drawn: the questions.
    """

    def __init__(self, model: Any, processor: Any, drawn: Dataset) -> None:
        self._costs = Costs.of(model)
        prompts = [answering.chat_prompt(processor, item.question) for item in drawn.items]
        made = processor.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        self._prompts = [len(tokens) for tokens in made]

    def shares(
        self,
        untrimmed: Mapping[str, Sequence[Any]],
        prediction: Mapping[str, Sequence[Any]],
        again: Sequence[bool],
        places: Sequence[int],
    ) -> dict[str, float]:
        """The expected image KV bytes and operations of answers, as shares of those of untrimmed answers.

        Args:
            untrimmed: the untrimmed model's columns, question by question, with `tokens`.
            prediction: those of the first attempts, with `kept`.
            again: whether each is made again untrimmed.
            places: of the questions to count.
        """
        everything = self._costs.shape.features_per_image
        spent, whole = np.zeros(2), np.zeros(2)
        for place in places:
            prompt = self._prompts[place]
            alone = self._cost(everything, prompt, untrimmed["tokens"][place])
            first = self._cost(prediction["kept"][place], prompt, prediction["tokens"][place])
            spent += first + alone * again[place]
            whole += alone
        bytes_, flops = spent / whole
        return {"kv_bytes": round(float(bytes_), 6), "flops": round(float(flops), 6)}

    def _cost(self, kept: int, prompt: int, tokens: int) -> NDArray[np.float64]:
        return np.array([self._costs.kv_bytes(kept), self._costs.flops(kept, prompt, tokens)])
