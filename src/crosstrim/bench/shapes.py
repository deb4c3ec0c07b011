"""Random models whose cross-attention layers have the size of the real ones, and prompts for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import nn

from crosstrim.memory import LLAMA_11B, LLAMA_90B, ModelShape
from crosstrim.method.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class Shape(Geometry):
    """The sizes that a cross-attention layer's time and memory follow from.

    Attributes:
        name: of the model that has them.
        hidden: width of the text.
        feed_forward: width inside the MLP.
        layers: text layers of the whole model, cross-attention layers among them.
        cross_layers: cross-attention layers of the whole model.
        patch_pixels: side of a patch.
        tower_hidden: width of the vision tower, in heads of 80.
        tower_layers: of the tower's first part.
        tower_global_layers: of its second part.
    """

    name: str
    hidden: int
    feed_forward: int
    layers: int
    cross_layers: int
    patch_pixels: int = 14
    tower_hidden: int = 1280
    tower_layers: int = 32
    tower_global_layers: int = 8

    @classmethod
    def of(cls, model: ModelShape, name: str, feed_forward: int) -> Shape:
        """The shape of a model whose sizes are known, with the vision tower of Llama-3.2-Vision."""
        return cls(
            **{field.name: getattr(model, field.name) for field in fields(Geometry)},
            name=name,
            hidden=model.hidden_size,
            feed_forward=feed_forward,
            layers=model.text_layers,
            cross_layers=model.cross_layers,
        )

    @property
    def tile_pixels(self) -> int:
        """Side of a tile (560 on 11B and 90B)."""
        return math.isqrt(self.features_per_tile - 1) * self.patch_pixels


SHAPES = {
    shape.name: shape
    for shape in (
        Shape.of(LLAMA_11B, "11B", feed_forward=14336),
        Shape.of(LLAMA_90B, "90B", feed_forward=28672),
        Shape(
            name="eighth",  # of 11B's width, with all of its features
            features_per_tile=LLAMA_11B.features_per_tile,
            tiles_per_image=LLAMA_11B.tiles_per_image,
            query_heads=4,
            key_value_heads=1,
            head_size=LLAMA_11B.head_size,
            hidden=512,
            feed_forward=1792,
            layers=40,
            cross_layers=8,
        ),
        Shape(
            name="tiny",
            features_per_tile=17,
            tiles_per_image=4,
            query_heads=8,
            key_value_heads=4,
            head_size=8,
            hidden=64,
            feed_forward=96,
            layers=8,
            cross_layers=3,
            patch_pixels=7,
            tower_hidden=80,
            tower_layers=1,
            tower_global_layers=1,
        ),
    )
}
IMAGE_TOKEN = 64
ROWS_BEFORE_IMAGE = 4  # beginning of text and the chat header's first tokens, about


def build(
    shape: Shape,
    *,
    cross_layers: int = 3,
    self_layers: int = 1,
    feed_forward: int | None = None,
    vocabulary: int = IMAGE_TOKEN,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """A model of few layers of this shape: open gates, random weights, a vision tower that is never run.

    Args:
        shape: sizes of its layers.
        cross_layers: how many cross-attention layers it has; they come last.
        self_layers: how many self-attention layers come before them, one at least.
        feed_forward: another width inside the MLPs, where these are not what is measured.
        vocabulary: tokens, where reading the output matrix is to be measured.
        dtype: of the weights.
        device: of the weights.
        seed: of the weights; the caller's random state stays as it is.

    Returns:
        A `MllamaForConditionalGeneration` in evaluation mode, without an end-of-sequence token.
    """
    from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

    text = MllamaTextConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=feed_forward or shape.feed_forward,
        num_hidden_layers=self_layers + cross_layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.key_value_heads,
        cross_attention_layers=list(range(self_layers, self_layers + cross_layers)),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = MllamaVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        attention_heads=1,
        num_hidden_layers=1,
        num_global_layers=1,
        intermediate_layers_indices=[0],
        vision_output_dim=16,
        image_size=shape.tile_pixels,
        patch_size=shape.patch_pixels,
        max_num_tiles=shape.tiles_per_image,
    )
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    with torch.random.fork_rng(), torch.device(device):
        model = MllamaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)  # the norms, and gates that are open
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()  # type: ignore[no-any-return]


def vision_tower(shape: Shape, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The vision tower of such a model, with random weights: a `MllamaVisionModel` in evaluation mode."""
    from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
    from transformers.models.mllama.modeling_mllama import MllamaVisionModel

    read = [layer for layer in (3, 7, 15, 23, 30) if layer < shape.tower_layers] or [0]
    config = MllamaVisionConfig(
        hidden_size=shape.tower_hidden,
        intermediate_size=4 * shape.tower_hidden,
        attention_heads=shape.tower_hidden // 80,
        num_hidden_layers=shape.tower_layers,
        num_global_layers=shape.tower_global_layers,
        intermediate_layers_indices=read,
        vision_output_dim=shape.tower_hidden * (1 + len(read)),
        image_size=shape.tile_pixels,
        patch_size=shape.patch_pixels,
        max_num_tiles=shape.tiles_per_image,
    )
    with torch.random.fork_rng(), torch.device(device):
        tower = MllamaVisionModel._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return tower.eval()  # type: ignore[no-any-return]


def pictures(shape: Shape, batch: int, *, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """What `vision_tower` takes of `batch` random pictures of all tiles."""
    sides = (shape.tile_pixels, shape.tile_pixels)
    return {
        "pixel_values": torch.rand(batch, 1, shape.tiles_per_image, 3, *sides, dtype=dtype, device=device),
        "aspect_ratio_ids": torch.full((batch, 1), 6, device=device),  # 2 x 2 tiles
        "aspect_ratio_mask": torch.ones(batch, 1, shape.tiles_per_image, dtype=torch.long, device=device),
    }


def prompt(
    shape: Shape,
    *,
    batch: int,
    rows: int,
    tiles: int | list[int] | None = None,
    images: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch of some images each, their features given so that the vision tower does not run.

    Args:
        shape: of the model.
        batch: B.
        rows: T, text rows; the first few come before the images and see nothing, the others see all.
        tiles: real tiles of an image, of every sample or of each; None: all.
        images: of each sample, one after the other.
        dtype: of the features.
        device: of everything.
        seed: of the features and the text.

    Returns:
        What the model's forward takes: input_ids [B, T], attention_mask [B, T], cross_attention_mask [B, T, images,
        tiles], cross_attention_states [B * images * tiles, features per tile, hidden].
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    real = [tiles] * batch if isinstance(tiles, int) else tiles or [shape.tiles_per_image] * batch
    before = min(ROWS_BEFORE_IMAGE, rows - images)
    mask = torch.zeros(batch, rows, images, shape.tiles_per_image, dtype=torch.long, device=device)
    for sample, count in enumerate(real):
        mask[sample, before:, :, :count] = 1
    ids = torch.randint(3, IMAGE_TOKEN, (batch, rows), generator=generator, device=device)
    ids[:, before : before + images] = IMAGE_TOKEN
    features = torch.randn(
        batch * images * shape.tiles_per_image,
        shape.features_per_tile,
        shape.hidden,
        generator=generator,
        dtype=dtype,
        device=device,
    )
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "cross_attention_mask": mask,
        "cross_attention_states": features,
    }


def next_token(inputs: dict[str, torch.Tensor], past: int) -> dict[str, torch.Tensor]:
    """One more token, for a forward pass on a cache that `inputs` filled.

    Args:
        inputs: of `prompt`.
        past: text tokens in the cache.
    """
    mask = inputs["cross_attention_mask"]
    later = mask[:, -1:].expand(-1, past + 1 - mask.shape[1], -1, -1)
    return {"input_ids": inputs["input_ids"][:, -1:], "cross_attention_mask": torch.cat([mask, later], dim=1)}
