"""What tells one model's weights from another's."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

from torch import nn

from crosstrim.models import quantised

_SAMPLED = 64  # values of each weight

_known: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[int, int], ...], str]] = WeakKeyDictionary()


def of_weights(model: nn.Module) -> str:
    """A hash over some values of every weight, which is quick and still tells two checkpoints apart."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        for more, part in quantised.parts(weight):
            digest.update(f"{name}{more} {tuple(part.shape)}".encode())
            if not part.is_meta:  # offloaded to disk
                step = max(1, part.numel() // _SAMPLED)
                digest.update(part.detach().flatten()[::step].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def of_weights_again(model: nn.Module) -> str:
    """`of_weights`, computed anew only where a weight was put in or written to since, for who asks at every batch."""
    state = tuple((id(weight), weight._version) for weight in model.parameters() if not weight.is_inference())
    if model not in _known or _known[model][0] != state:
        _known[model] = state, of_weights(model)
    return _known[model][1]
