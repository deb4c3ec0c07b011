"""What a server tells of its model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from crosstrim.models import mllama


@dataclass(frozen=True)
class Facts:
    """What a server tells of its model.

    Attributes:
        architecture: as its configuration calls it.
        parameters: how many there are.
        weight_bytes: that they take.
        device_bytes: of these, those that are not on the CPU.
        dtype: of most weights, such as "bfloat16".
        max_tokens: that it reads, prompt and answer together.
        digest: SHA-256 of its configuration.
        chat_template: in Jinja; empty where it has none.
    """

    architecture: str
    parameters: int
    weight_bytes: int
    device_bytes: int
    dtype: str
    max_tokens: int
    digest: str
    chat_template: str

    @classmethod
    def of(cls, model: Any, processor: Any) -> Facts:
        """Read them off a loaded model.

        Args:
            model: of `crosstrim.load`.
            processor: of `crosstrim.load`.
        """
        weights = [(one.numel() * one.element_size(), one.device.type) for one in model.parameters()]
        config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
        return cls(
            architecture=str(model.config.model_type),
            parameters=int(model.num_parameters()),
            weight_bytes=sum(size for size, _ in weights),
            device_bytes=sum(size for size, kind in weights if kind != "cpu"),
            dtype=str(model.dtype).removeprefix("torch."),
            max_tokens=mllama.max_tokens(model),
            digest=hashlib.sha256(config.encode()).hexdigest(),
            chat_template=processor.chat_template or "",
        )
