"""A random Mllama small enough to run thousands of times, and inputs for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

VOCABULARY = 60
IMAGE_TOKEN = VOCABULARY
BOS, EOS, PAD = 1, 2, 0
TILE_PIXELS, PATCH_PIXELS = 28, 7
FEATURES_PER_TILE = 17
FEATURES_PER_IMAGE = 4 * FEATURES_PER_TILE
CROSS_LAYERS = (1, 3, 6)
ASPECT_RATIO_ID = {1: 1, 2: 2, 3: 3, 4: 6}


def config(
    dtype: torch.dtype = torch.float32, layers: int = 8, cross_layers: tuple[int, ...] = CROSS_LAYERS
) -> MllamaConfig:
    text = MllamaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        cross_attention_layers=list(cross_layers),
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    vision = MllamaVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        attention_heads=4,
        num_hidden_layers=3,
        num_global_layers=2,
        intermediate_layers_indices=[0, 2],
        vision_output_dim=96,
        image_size=TILE_PIXELS,
        patch_size=PATCH_PIXELS,
        max_num_tiles=4,
    )
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, dtype=dtype)


def randomised(config: MllamaConfig, seed: int = 0, attention: str = "sdpa") -> MllamaForConditionalGeneration:
    """A model of this configuration whose gates are open and whose cross-attention is opinionated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MllamaForConditionalGeneration._from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("_gate", "gate_attn", "gate_ffn", ".gate")):
                    parameter.fill_(0.8)
                elif name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.fill_(2.0)
                elif parameter.dim() >= 2 and "embed" not in name:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
                elif "embed_tokens" in name:
                    parameter.normal_(0, 1)
    return model


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> MllamaForConditionalGeneration:
    """A model in which trimming can be seen, that generates to the end."""
    return copy.deepcopy(_built(seed, dtype, attention))


@cache
def _built(seed: int, dtype: torch.dtype, attention: str) -> MllamaForConditionalGeneration:
    """Made once in a process, since a copy takes half the time; nobody writes to it."""
    return _generating(randomised(config(), seed, attention)).to(dtype)


def shallow() -> MllamaForConditionalGeneration:
    """One layer of each kind, and one that obeys: for compilers, whose time is spent per layer."""
    few = config(layers=3, cross_layers=(1, 2))
    few.vision_config.update({"num_hidden_layers": 1, "num_global_layers": 1, "intermediate_layers_indices": [0]})
    few.vision_config.update({"vision_output_dim": 2 * few.vision_config.hidden_size})
    return _generating(randomised(few))


def _generating(model: MllamaForConditionalGeneration) -> MllamaForConditionalGeneration:
    model.generation_config.eos_token_id = None  # generate to the end, so that every token is compared
    model.generation_config.pad_token_id = PAD
    model.generation_config.do_sample = False
    return model.eval()


@dataclass(frozen=True)
class Image:
    """A picture with this many real tiles."""

    tiles: int
    seed: int = 0


Piece = int | Image


def tokens(pieces: list[Piece], seed: int = 0) -> list[int]:
    """BOS, then for every int that many random text tokens and for every image its token."""
    generator = torch.Generator().manual_seed(seed)
    ids = [BOS]
    for piece in pieces:
        if isinstance(piece, Image):
            ids.append(IMAGE_TOKEN)
        else:
            ids += torch.randint(5, VOCABULARY, (piece,), generator=generator).tolist()
    return ids


def inputs(*samples: list[Piece], seeds: list[int] | None = None, pad: str = "left") -> dict[str, torch.Tensor]:
    """What the processor would give for a batch of prompts made of text lengths and images."""
    seeds = seeds or list(range(len(samples)))
    ids = [tokens(sample, seed) for sample, seed in zip(samples, seeds, strict=True)]
    longest = max(map(len, ids))
    padding = [[PAD] * (longest - len(one)) for one in ids]
    padded = [gap + one if pad == "left" else one + gap for gap, one in zip(padding, ids, strict=True)]
    mask = [
        [0] * len(gap) + [1] * len(one) if pad == "left" else [1] * len(one) + [0] * len(gap)
        for gap, one in zip(padding, ids, strict=True)
    ]
    batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    images = [[piece for piece in sample if isinstance(piece, Image)] for sample in samples]
    return batch | image_inputs(images, padded) if any(images) else batch


def image_inputs(images: list[list[Image]], ids: list[list[int]]) -> dict[str, torch.Tensor]:
    most = max(map(len, images))
    pixels = torch.zeros(len(images), most, 4, 3, TILE_PIXELS, TILE_PIXELS)
    ratio_ids = torch.zeros(len(images), most, dtype=torch.long)
    ratio_mask = torch.zeros(len(images), most, 4, dtype=torch.long)
    ratio_mask[:, :, 0] = 1
    for sample, row in enumerate(images):
        for place, image in enumerate(row):
            generator = torch.Generator().manual_seed(1000 + image.seed)
            pixels[sample, place, : image.tiles] = torch.randn(image.tiles, *pixels.shape[3:], generator=generator)
            ratio_ids[sample, place] = ASPECT_RATIO_ID[image.tiles]
            ratio_mask[sample, place, : image.tiles] = 1
    cross_mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(row, IMAGE_TOKEN) for row in ids],
        num_tiles=[[image.tiles for image in row] for row in images],
        max_num_tiles=4,
        length=len(ids[0]),
    )
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": ratio_mask,
        "cross_attention_mask": torch.from_numpy(cross_mask),
    }
