"""Find and repair, reversibly, where the installed transformers departs from Meta's Llama-3.2-Vision.

Each departure is detected by running a tiny probe of the installed code, never by its version number, and
repaired on one model instance with torch's own hooks. docs/compat.md tells the story of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from crosstrim.models import mllama, probe


@dataclass(frozen=True)
class Finding:
    """One place where transformers may depart from the reference.

    Attributes:
        name: short name of the departure.
        departs: whether the installed code was seen to depart.
        repaired: whether the model that was checked carries the repair (False when no model was given).
        summary: what is different, in a sentence.
        reference: where it is discussed.
    """

    name: str
    departs: bool
    repaired: bool
    summary: str
    reference: str

    @property
    def open(self) -> bool:
        """True when results differ from Meta's and nothing was done about it."""
        return self.departs and not self.repaired

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain JSON types."""
        return asdict(self)


class _StatesBeforeEachLayer:
    """Forward hook on the local vision encoder: hand out the states BEFORE each layer, as Meta's indices mean."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        # The state after the last layer stays available as last_hidden_state.
        output.hidden_states = (entered, *output.hidden_states[:-1])
        return output


class _RowsThatSeeNothingPassThrough:
    """Forward hook on a cross-attention decoder layer: rows that may see no image feature leave unchanged.

    Meta's code multiplies both the attention and the MLP output of such a row with zero, so the row is its own
    residual. Rows never mix inside a cross-attention layer, hence restoring the input row afterwards is exact.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        row_mask = kwargs.get("full_text_row_masked_out_mask")
        if row_mask is None:
            return None
        entered = args[0] if args else kwargs["hidden_states"]
        sees_something = row_mask[:, 0].to(output.device) != 0
        return torch.where(sees_something, output, entered.to(output.device))


class _NeverCausal:
    """Forward pre-hook on a cross-attention module: without a mask, SDPA must not take it for a decoder."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs.setdefault("is_causal", False)
        return args, kwargs


class CompatHandle:
    """The repairs applied to one model; `remove()` takes them off, and so does leaving the `with` block."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take off what this handle put on; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> CompatHandle:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()


@dataclass(frozen=True)
class _Departure:
    name: str
    summary: str
    reference: str
    departs: Callable[[], bool]
    hook: type
    modules: Callable[[mllama.Mllama], list[nn.Module]]

    def is_on(self, model: mllama.Mllama) -> bool:
        return all(_carries(module, self.hook) for module in self.modules(model))

    def put_on(self, model: mllama.Mllama) -> list[RemovableHandle]:
        missing = [module for module in self.modules(model) if not _carries(module, self.hook)]
        if self.hook is _NeverCausal:
            return [module.register_forward_pre_hook(self.hook(), with_kwargs=True) for module in missing]
        return [module.register_forward_hook(self.hook(), with_kwargs=True) for module in missing]


def _carries(module: nn.Module, hook: type) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # What torch.compile puts around a module has hooks of its own, and runs the module with the module's.
    inner = getattr(module, "_orig_mod", None)
    return any(isinstance(one, hook) for one in hooks) or (isinstance(inner, nn.Module) and _carries(inner, hook))


@lru_cache(maxsize=1)
@torch.no_grad()
def _vision_states_are_late() -> bool:
    from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
    from transformers.models.mllama.modeling_mllama import MllamaVisionEncoder

    config = MllamaVisionConfig(hidden_size=8, intermediate_size=8, attention_heads=1)
    config._attn_implementation = "eager"
    encoder = probe.built(lambda: MllamaVisionEncoder(config, num_layers=2))
    entered = probe.ramp(-1, 1, 1, 3, 8)
    return not torch.equal(encoder(entered).hidden_states[0], entered)


@lru_cache(maxsize=1)
@torch.no_grad()
def _blind_rows_leak() -> bool:
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

    config = probe.text_config()
    config._attn_implementation = "eager"
    layer = cast(Any, probe.built(lambda: MllamaCrossAttentionDecoderLayer(config, 0)))
    layer.cross_attn_attn_gate.fill_(0.5)
    layer.cross_attn_mlp_gate.fill_(0.5)
    rows = probe.ramp(-1, 1, 1, 2, 8)
    left = layer(
        rows,
        cross_attention_states=probe.ramp(1, 2, 1, 3, 8),
        cross_attention_mask=rows.new_zeros(1, 1, 2, 3),
        attention_mask=None,
        full_text_row_masked_out_mask=rows.new_tensor([0.0, 1.0]).reshape(1, 1, 2, 1),
    )
    left = left[0] if isinstance(left, tuple) else left
    return not torch.equal(left[0, 0], rows[0, 0])


@lru_cache(maxsize=1)
@torch.no_grad()
def _maskless_attention_is_causal() -> bool:
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    config = probe.text_config()
    config._attn_implementation = "sdpa"
    attention = cast(Any, probe.built(lambda: MllamaTextCrossAttention(config, 0)))
    rows = probe.ramp(-1, 1, 1, 2, 8)
    features = probe.ramp(1, 2, 1, 3, 8) * rows.new_tensor([1.0, -1.0, 2.0]).reshape(1, 3, 1)
    without = attention(rows, cross_attention_states=features, attention_mask=None)[0]
    with_mask = attention(rows, cross_attention_states=features, attention_mask=rows.new_zeros(1, 1, 2, 3))[0]
    return not torch.allclose(without, with_mask, atol=1e-5)


_DEPARTURES = (
    _Departure(
        name="vision_features",
        summary="the vision tower hands out hidden states one layer later than intermediate_layers_indices mean",
        reference="Meta's llama-models and transformers <= 4.54 collect the states before each layer",
        departs=_vision_states_are_late,
        hook=_StatesBeforeEachLayer,
        modules=lambda model: [cast(nn.Module, cast(Any, model.vision_model).transformer)],
    ),
    _Departure(
        name="blind_rows",
        summary="text rows before the image, which may see no feature, attend to all of them, padding included",
        reference="huggingface/transformers #39379, #47845",
        departs=_blind_rows_leak,
        hook=_RowsThatSeeNothingPassThrough,
        modules=lambda model: list(model.cross_layers),
    ),
    _Departure(
        name="causal_without_mask",
        summary="cross-attention without a mask runs causally under SDPA and drops features",
        reference="huggingface/transformers #48172",
        departs=_maskless_attention_is_causal,
        hook=_NeverCausal,
        modules=lambda model: [cast(nn.Module, cast(Any, layer).cross_attn) for layer in model.cross_layers],
    ),
)


def check(model: nn.Module | None = None) -> list[Finding]:
    """Probe the installed transformers, and say which repairs `model` carries.

    Args:
        model: a loaded Mllama, or None to look at the installed code alone.

    Returns:
        One finding per known departure, whether it is present or not.

    Raises:
        UnsupportedModelError: `model` holds no Mllama.
    """
    located = None if model is None else mllama.locate(model)
    return [
        Finding(
            name=departure.name,
            departs=departure.departs(),
            repaired=located is not None and departure.is_on(located),
            summary=departure.summary,
            reference=departure.reference,
        )
        for departure in _DEPARTURES
    ]


def apply(model: nn.Module, only: str | None = None) -> CompatHandle:
    """Repair every departure the installed transformers shows, on this model instance alone.

    Repairs that are on already stay as they are, so a second call is harmless. Nothing global is patched.

    Args:
        model: a loaded Mllama.
        only: name of a single departure to repair; None repairs all.

    Returns:
        A handle whose `remove()` undoes what this call did.

    Raises:
        UnsupportedModelError: `model` holds no Mllama.
        ConfigError: `only` names no known departure.
    """
    from crosstrim.errors import ConfigError

    names = [departure.name for departure in _DEPARTURES]
    if only is not None and only not in names:
        raise ConfigError(f"no compat repair is called {only!r}; there are {', '.join(names)}.")
    located = mllama.locate(model)
    handles: list[RemovableHandle] = []
    for departure in _DEPARTURES:
        if only in (None, departure.name) and departure.departs():
            handles += departure.put_on(located)
    return CompatHandle(handles)


def repair_vision_tower(vision_model: nn.Module) -> None:
    """Repair a vision tower that stands alone, in an engine that has its own text model.

    Args:
        vision_model: a `MllamaVisionModel`.
    """
    if _vision_states_are_late():
        encoder = cast(nn.Module, cast(Any, vision_model).transformer)
        encoder.register_forward_hook(_StatesBeforeEachLayer(), with_kwargs=True)


def blind_rows_pass_through(layer: nn.Module) -> bool:
    """Whether rows that see no feature leave this cross-attention decoder layer unchanged (Meta's rule)."""
    return not _blind_rows_leak() or _carries(layer, _RowsThatSeeNothingPassThrough)
