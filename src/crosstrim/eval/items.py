"""Questions of a dataset as inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from crosstrim.asking.batches import Encoder
from crosstrim.asking.inputs import Inputs
from crosstrim.data.dataset import Item


def asked(encoder: Encoder, items: Sequence[Item], max_new_tokens: int = 0) -> AbstractContextManager[Inputs]:
    """`Encoder.asked` of these questions, each picture opened once."""
    of_picture = {item.picture: item for item in items}
    opened = {name: item.open() for name, item in of_picture.items()}
    return encoder.asked(
        [[opened[item.picture]] for item in items], [item.question for item in items], max_new_tokens
    )
