"""Llama-3.2-Vision ("Mllama"): where transformers keeps its layers, and the shapes they exchange."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from crosstrim.errors import UnsupportedModelError
from crosstrim.memory import ModelShape
from crosstrim.method.geometry import Geometry

MODELING = "transformers.models.mllama.modeling_mllama"

# `<|start_header_id|>user<|end_header_id|>` in the vocabulary that every Llama-3.2-Vision checkpoint shares.
LLAMA_VOCABULARY_SIZE = 128256
LLAMA_USER_TURN_IDS = (128006, 882, 128007)


@dataclass(frozen=True)
class Mllama:
    """The parts of a loaded Mllama that trimming touches.

    Attributes:
        head: `MllamaForConditionalGeneration`, or None when only the model below it was given.
        model: `MllamaModel`, vision tower and decoder stack together.
        vision_model: `MllamaVisionModel`.
        cross_layers: the cross-attention decoder layers in order; the first one is the leader.
        layer_indices: their positions in the decoder stack, which are also their places in the KV cache.
        geometry: how image features are counted, and how many heads look at them.
        image_token_id: id of `<|image|>`.
        user_turn_ids: token ids that open a user turn, when the vocabulary is Llama-3.2's own.
    """

    head: nn.Module | None
    model: nn.Module
    vision_model: nn.Module
    cross_layers: tuple[nn.Module, ...]
    layer_indices: tuple[int, ...]
    geometry: Geometry
    image_token_id: int
    user_turn_ids: tuple[int, ...] | None

    @property
    def leader(self) -> nn.Module:
        """The first cross-attention layer, whose attention scores the features."""
        return self.cross_layers[0]

    @property
    def followers(self) -> tuple[nn.Module, ...]:
        """Every later cross-attention layer."""
        return self.cross_layers[1:]


def locate(model: nn.Module) -> Mllama:
    """Find the Mllama inside `model`, through any wrapper (PEFT, quantisation, device_map).

    Args:
        model: an `MllamaForConditionalGeneration`, or a module that holds exactly one.

    Returns:
        The layers and sizes trimming needs.

    Raises:
        UnsupportedModelError: there is no such model inside, there are several, or it has no
            cross-attention layer.
    """
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration, MllamaModel

    name = type(model).__name__
    supported = "crosstrim supports MllamaForConditionalGeneration (Llama-3.2-Vision 11B and 90B, and 'mini')"
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a loaded model, got {name}; {supported}.")
    # Searching thousands of modules takes milliseconds, and a bare model is no haystack.
    if isinstance(model, MllamaModel):
        modules = [model]
    elif isinstance(model, MllamaForConditionalGeneration):
        modules = [model, model.model]
    else:
        modules = list(model.modules())
    found = [module for module in modules if isinstance(module, MllamaModel)]
    if len(found) != 1:
        problem = "holds no Mllama with a vision tower" if not found else f"holds {len(found)} Mllama models"
        raise UnsupportedModelError(f"{name} {problem}; {supported}.")
    mllama = cast(Any, found[0])
    text_model = mllama.language_model
    indices = tuple(sorted(index for index in text_model.cross_attention_layers if index < len(text_model.layers)))
    if not indices:
        raise UnsupportedModelError(f"{name} has no cross-attention layer to trim; {supported}.")
    return Mllama(
        head=next((module for module in modules if isinstance(module, MllamaForConditionalGeneration)), None),
        model=found[0],
        vision_model=mllama.vision_model,
        cross_layers=tuple(text_model.layers[index] for index in indices),
        layer_indices=indices,
        geometry=geometry_of(mllama.config),
        image_token_id=mllama.config.image_token_index,
        user_turn_ids=user_turn_ids_of(mllama.config),
    )


def user_turn_ids_of(config: Any) -> tuple[int, ...] | None:
    """Token ids that open a user turn, where the vocabulary is Llama-3.2's own.

    Args:
        config: an `MllamaConfig`.
    """
    return LLAMA_USER_TURN_IDS if config.text_config.vocab_size == LLAMA_VOCABULARY_SIZE else None


def user_turn_ids(tokenizer: Any) -> tuple[int, ...] | None:
    """Token ids that open a user turn in Llama-3's chat format, or None when the tokenizer does not know it.

    Args:
        tokenizer: a transformers tokenizer.
    """
    ids = tokenizer.encode("<|start_header_id|>user<|end_header_id|>", add_special_tokens=False)
    known = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return tuple(ids) if len(ids) >= 3 and {ids[0], ids[-1]} <= known else None


def geometry_of(config: Any) -> Geometry:
    """The sizes of the model with this configuration.

    Args:
        config: an `MllamaConfig`.
    """
    text, vision = config.text_config, config.vision_config
    return Geometry(
        features_per_tile=1 + (vision.image_size // vision.patch_size) ** 2,
        tiles_per_image=vision.max_num_tiles,
        query_heads=text.num_attention_heads,
        key_value_heads=text.num_key_value_heads,
        head_size=text.hidden_size // text.num_attention_heads,
    )


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a cross-attention decoder layer."""
    return cast(nn.Module, cast(Any, layer).cross_attn)


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer computes; accelerate moves the weights of an offloaded one there only while it does.

    Args:
        layer: of a loaded model.
    """
    device = next(layer.parameters()).device
    if device.type != "meta":
        return device
    hooks = [module._hf_hook for module in layer.modules() if hasattr(module, "_hf_hook")]
    places = [getattr(one, "execution_device", None) for hook in hooks for one in getattr(hook, "hooks", (hook,))]
    for place in places:
        if place is not None:
            return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return device


def tiles_seen(mask: torch.Tensor, past: int, rows: int) -> torch.Tensor:
    """What the present text rows may see.

    Args:
        mask: cross_attention_mask as the processor makes it, [B, R, images, tiles], of the present rows or of all so
            far.
        past: rows before the present ones.
        rows: T, the present ones.

    Returns:
        [B, T, images * tiles] bool.
    """
    present = mask if mask.shape[1] == rows else mask[:, past : past + rows]
    return present.flatten(2) == 1


def as_sequence(features: torch.Tensor, batch_size: int) -> torch.Tensor:
    """[B * images * tiles, features per tile, hidden], as the vision tower gives them, to [B, N, hidden]."""
    return features.reshape(batch_size, -1, features.shape[-1])


def empty(config: Any) -> nn.Module:
    """The model of this configuration, an `MllamaForConditionalGeneration`, without the values of its weights.

    Args:
        config: an `MllamaConfig`.
    """
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

    with torch.device("meta"):
        return cast(nn.Module, MllamaForConditionalGeneration._from_config(config))


def shape_of(config: Any, name: str) -> ModelShape:
    """The numbers of a model on which its memory depends, in the dtype its configuration names; no weight is made.

    Args:
        config: an `MllamaConfig`.
        name: what to call the model.

    Raises:
        UnsupportedModelError: it is the configuration of something else.
    """
    if getattr(config, "model_type", None) != "mllama":
        raise UnsupportedModelError(
            f"{name} has a configuration of type {getattr(config, 'model_type', None)!r}; needed is 'mllama'."
        )
    text = config.text_config
    return ModelShape(
        **asdict(geometry_of(config)),
        name=name,
        text_layers=text.num_hidden_layers,
        cross_layers=sum(index < text.num_hidden_layers for index in text.cross_attention_layers),
        hidden_size=text.hidden_size,
        parameters=sum(parameter.numel() for parameter in empty(config).parameters()),
        bytes_per_element=(config.dtype or torch.float32).itemsize,
    )


def token_parameters(config: Any) -> int:
    """Weights of the decoder that every text token is multiplied with; the projections of image features are others.

    Args:
        config: an `MllamaConfig`.
    """
    model: Any = empty(config)
    decoder = model.model.language_model
    of_features = ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight")
    weights = [weight for name, weight in decoder.layers.named_parameters() if not name.endswith(of_features)]
    return sum(weight.numel() for weight in (*weights, model.lm_head.weight) if weight.dim() == 2)


def max_tokens(model: nn.Module) -> int:
    """Text tokens that the model reads, prompt and answer together."""
    return int(cast(Any, locate(model).model).config.text_config.max_position_embeddings)
