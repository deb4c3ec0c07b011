"""The model before training: a small Mllama, every weight drawn from one seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from crosstrim.models import compat

from .settings import LAYOUTS, MAX_TILES, Settings
from .spoken import listen
from .task import Task
from .tokenizer import BEGIN, END_OF_TURN, IMAGE, PADDING

_QUERY_KEY_GAIN = 2.0
_GATE = 1.0
_POSITION_GATE = 0.7


def build_config(task: Task[Any]) -> MllamaConfig:
    """Return the configuration of the model that the task's settings describe."""
    settings = task.settings
    begin, end, padding, image = task.tokenizer.convert_tokens_to_ids([BEGIN, END_OF_TURN, PADDING, IMAGE])
    vision = MllamaVisionConfig(
        hidden_size=settings.vision_width,
        num_hidden_layers=settings.vision_layers,
        num_global_layers=settings.vision_global_layers,
        attention_heads=settings.vision_heads,
        intermediate_size=4 * settings.vision_width,
        vision_output_dim=settings.vision_width * (1 + len(settings.vision_intermediate)),
        image_size=settings.tile,
        patch_size=settings.patch,
        max_num_tiles=MAX_TILES,
        intermediate_layers_indices=list(settings.vision_intermediate),
        supported_aspect_ratios=[list(layout) for layout in LAYOUTS],
    )
    text = MllamaTextConfig(
        vocab_size=image,
        hidden_size=settings.text_width,
        intermediate_size=settings.text_mlp,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=settings.text_heads,
        num_key_value_heads=settings.text_key_heads,
        cross_attention_layers=list(settings.cross_layers),
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=padding,
    )
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=image)


def build_model(task: Task[Any]) -> MllamaForConditionalGeneration:
    """Return the untrained model in float32, repaired to Meta's semantics."""
    torch.manual_seed(task.settings.seed)
    model = MllamaForConditionalGeneration(build_config(task))
    _initialise(model, task.settings)
    if task.speaks:
        listen(model, task)
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )
    compat.apply(model)
    return model


@torch.no_grad()
def _initialise(model: MllamaForConditionalGeneration, settings: Settings) -> None:
    """Draw every weight so that signals and attention start alive: transformers' defaults leave the gates shut."""
    depth = math.sqrt(2 * settings.text_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # Normed queries and keys cap the attention logits at gain**2 * sqrt(head size).
            parameter.fill_(_QUERY_KEY_GAIN)
        elif name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            parameter.fill_(_GATE)
        elif name.endswith(("gate_attn", "gate_ffn")):
            parameter.fill_(math.pi / 4)
        elif name.endswith("embedding.gate"):
            parameter.fill_(_POSITION_GATE)
        elif name.endswith("embed_tokens.weight"):
            nn.init.normal_(parameter, std=0.7)
        elif name.endswith("gated_positional_embedding.tile_embedding.weight"):
            parameter.copy_(_positions(settings).flatten(1))
        elif "embedding" in name and "patch" not in name:
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith("lm_head.weight"):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            shrink = depth if name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight")) else 1.0
            nn.init.normal_(parameter, std=1 / math.sqrt(fan_in) / shrink)
        elif name.endswith("bias"):
            parameter.zero_()
    for layer in model.model.vision_model.transformer.layers:
        # Queries that start equal to keys attend to what looks alike and lies near, from the first step on.
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def _waves(values: Tensor, width: int) -> Tensor:
    """Return sines and cosines of the values, [..., width], from the period of a few patches to that of a picture."""
    frequencies = torch.pi / 2 ** torch.linspace(1, 6, width // 2)
    angles = values[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _positions(settings: Settings) -> Tensor:
    """Return where each patch lies on the whole canvas, in patches and relative to the canvas, as waves.

    Shape [1 + layouts, MAX_TILES, 1 + patches, width]; zero for padding tiles and the class feature of each tile.
    """
    side, width = settings.tile // settings.patch, settings.vision_width
    table = torch.zeros(1 + len(LAYOUTS), MAX_TILES, 1 + side * side, width)
    inner = torch.arange(side)
    for index, (rows, columns) in enumerate(LAYOUTS, start=1):
        for tile in range(rows * columns):
            y = (inner + tile // columns * side).float()[:, None].expand(side, side).flatten()
            x = (inner + tile % columns * side).float()[None].expand(side, side).flatten()
            share = (x + 0.5) / (columns * side), (y + 0.5) / (rows * side)
            parts = [_waves(value, width // 4) for value in (x, y, share[0] * side, share[1] * side)]
            table[index, tile, 1:] = torch.cat(parts, dim=-1)
    return table
