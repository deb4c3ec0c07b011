"""Mllama, made of vLLM's layers, with trimmed image features.

The first cross-attention layer attends to all visible features of a new prompt beside vLLM's cache, chooses, and
writes what stays; the later layers project, write and read nothing else. Decoding is vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
import vllm
from torch import nn
from transformers.models.mllama.modeling_mllama import MllamaVisionModel
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention, CrossAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import CrossAttentionSpec

from crosstrim.engines.prompt import Prompt, cross_attend
from crosstrim.engines.vllm import launch
from crosstrim.engines.vllm.processing import DummyInputs, Info, Processor
from crosstrim.errors import EngineError
from crosstrim.models import compat

if not launch.is_tested(vllm.__version__):
    raise EngineError(f"vLLM {vllm.__version__} was not tested with crosstrim; install vllm~={launch.TESTED}.0.")


@dataclass
class _Step:
    sees: torch.Tensor  # [rows, 1] bool, whether the row sees any image
    prompts: list[Prompt]  # the requests with images among the new ones


@dataclass(frozen=True)
class _KeptSpec(CrossAttentionSpec):
    kept: int = 0

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request; vLLM would take the images of a whole step for one request's."""
        return int(cdiv(self.kept, self.block_size) * self.page_size_bytes)


class _KeptAttention(CrossAttention):
    kept = 0  # features that a request keeps at most

    def get_kv_cache_spec(self, vllm_config: Any) -> _KeptSpec:
        stock = super().get_kv_cache_spec(vllm_config)
        return _KeptSpec(**{field.name: getattr(stock, field.name) for field in fields(stock)}, kept=self.kept)


class _Heads(nn.Module):
    """vLLM's attention for heads of any size: its CPU kernels know a few, and others get zeros at their end."""

    def __init__(self, kind: type[Attention], config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.size = padded = config.hidden_size // config.num_attention_heads
        self.queries, self.keys = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        if current_platform.is_cpu():
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            padded = min(size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= self.size)
        self.missing = padded - self.size
        options = {"num_kv_heads": self.keys, "cache_config": vllm_config.cache_config, "prefix": prefix}
        self.attn = kind(self.queries, padded, self.size**-0.5, **options)
        backend = self.attn.attn_backend
        if not vllm_config.use_v2_model_runner and backend.get_builder_cls().reorder_batch_threshold is not None:
            name = backend.get_name()
            raise EngineError(f"{name} sorts the batch, which mixes up images; take --attention-backend FLASH_ATTN.")

    def forward(self, queries: Any, keys: Any, values: Any) -> torch.Tensor:
        """Queries [rows, heads, D] to the same; keys and values are to be written, or None."""
        if self.missing:
            pad = (0, self.missing)
            queries, keys, values = (None if part is None else F.pad(part, pad) for part in (queries, keys, values))
        return self.attn(queries, keys, values).view_as(queries)[..., : self.size]


class _SelfAttention(nn.Module):
    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, heads, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.heads = _Heads(Attention, config, vllm_config, f"{prefix}.attn")
        size = self.heads.size
        self.qkv_proj = QKVParallelLinear(hidden, size, heads, keys, bias=False, prefix=f"{prefix}.qkv_proj")
        self.o_proj = RowParallelLinear(heads * size, hidden, bias=False, prefix=f"{prefix}.o_proj")
        self.rotary = get_rope(size, config.max_position_embeddings, rope_parameters=config.rope_parameters)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, step: _Step) -> torch.Tensor:
        parts = [count * self.heads.size for count in (self.heads.queries, self.heads.keys, self.heads.keys)]
        queries, keys, values = self.qkv_proj(hidden)[0].split(parts, dim=-1)
        rotate = self.rotary.forward_native if self.heads.missing else self.rotary  # kernels know the same few sizes
        queries, keys = rotate(positions, queries, keys)
        split = [part.reshape(len(hidden), -1, self.heads.size) for part in (queries, keys, values)]
        return self.o_proj(self.heads(*split).flatten(1))[0]


class _CrossAttention(nn.Module):
    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str, leads: bool, kept: int) -> None:
        super().__init__()
        hidden, heads, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.leads = leads
        self.heads = _Heads(_KeptAttention, config, vllm_config, f"{prefix}.attn")
        self.heads.attn.kept = kept
        size = self.heads.size
        for name, rows in (("q_proj", heads * size), ("k_proj", keys * size), ("v_proj", keys * size)):
            setattr(self, name, ColumnParallelLinear(hidden, rows, bias=False, prefix=f"{prefix}.{name}"))
        self.o_proj = RowParallelLinear(heads * size, hidden, bias=False, prefix=f"{prefix}.o_proj")
        self.q_norm, self.k_norm = (RMSNorm(size, eps=config.rms_norm_eps) for _ in range(2))

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, step: _Step) -> torch.Tensor:
        queries = self.q_norm(self._split(self.q_proj, hidden))
        new = [*cross_attend(step.prompts, queries, self._project, _all_heads if self.leads else None)]
        keys, values, own = ([part[place] for part in new] for place in range(3))
        output = self.heads(queries, torch.cat(keys) if new else None, torch.cat(values) if new else None)
        for prompt, attended in zip(step.prompts, own, strict=True):
            output[prompt.rows] = attended
        return self.o_proj(torch.where(step.sees.unsqueeze(-1), output, 0).flatten(1))[0]

    def _project(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k_norm(self._split(self.k_proj, features)), self._split(self.v_proj, features)

    def _split(self, projection: Any, states: torch.Tensor) -> torch.Tensor:
        """[rows, heads of this rank, D]."""
        return projection(states)[0].view(len(states), -1, self.heads.size)


class _Layer(nn.Module):
    """One that looks at images weighs what it adds by gates, and adds it to rows that see any."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str, index: int, kept: int) -> None:
        super().__init__()
        crossing = sorted(config.cross_attention_layers)
        self.crosses = index in crossing
        if self.crosses:
            leads, name = index == crossing[0], f"{prefix}.cross_attn"
            self.cross_attn = _CrossAttention(config, vllm_config, name, leads, kept)
            self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
            self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))
        else:
            self.self_attn = _SelfAttention(config, vllm_config, f"{prefix}.self_attn")
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.mlp = LlamaMLP(hidden, config.intermediate_size, config.hidden_act, prefix=f"{prefix}.mlp")
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(hidden, eps=eps) for _ in range(2))

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, step: _Step) -> torch.Tensor:
        attention = self.cross_attn if self.crosses else self.self_attn
        attended = attention(self.input_layernorm(hidden), positions, step)
        hidden = hidden + (self.cross_attn_attn_gate.tanh() * attended if self.crosses else attended)
        added = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + (
            self.cross_attn_mlp_gate.tanh() * torch.where(step.sees, added, 0) if self.crosses else added
        )


class _TextModel(nn.Module):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str, kept: int) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size + 8, config.hidden_size)  # with `<|image|>`
        layers = [(f"{prefix}.layers.{index}", index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(_Layer(config, vllm_config, *layer, kept) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, step: _Step) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, positions, step)
        return self.norm(hidden)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class MllamaForConditionalGeneration(nn.Module, SupportsMultiModal):
    """Llama-3.2-Vision, trimmed."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        config, text = model.hf_config, model.hf_config.text_config
        self.trim = launch.trim_of(config)
        kept = self.trim.largest(launch.images_planned(model.multimodal_config))
        self.vision_model = MllamaVisionModel._from_config(config.vision_config)
        compat.repair_vision_tower(self.vision_model)
        self.multi_modal_projector = nn.Linear(config.vision_config.vision_output_dim, text.hidden_size)
        name = f"{prefix}.language_model".lstrip(".")
        head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=f"{name}.lm_head")
        decoder: Any = _TextModel(text, vllm_config, f"{name}.model", kept)
        self.language_model = nn.ModuleDict({"model": decoder, "lm_head": head})
        self.logits_processor = LogitsProcessor(text.vocab_size)
        self._reads = next(layer.cross_attn.heads.attn.layer_name for layer in decoder.layers if layer.crosses)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for an image in a prompt."""
        return "<|image|>" if modality == "image" else None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take the weights under the checkpoint's names."""
        return AutoWeightsLoader(self).load_weights(weights)

    def embed_input_ids(self, input_ids: torch.Tensor, *images: Any, **options: Any) -> torch.Tensor:
        """[rows] to [rows, hidden]; images are read elsewhere."""
        embed: Any = self.language_model["model"].embed_tokens
        return embed(input_ids)

    def embed_multimodal(self, **inputs: Any) -> list[torch.Tensor]:
        """Encode images, those of one request at a time: [N, hidden] a request, padding tiles included.

        Each carries what `forward` needs to know of its request: the trim, the prompt's ids, the images' real tiles.
        """
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "prompt_ids", "keep")
        encoded = []
        for pixels, ratios, mask, ids, keep in zip(*(inputs[name] for name in names), strict=True):
            batch = [part.unsqueeze(0) for part in (pixels, ratios, mask.to(ratios.device, non_blocking=True))]
            features = self.multi_modal_projector(self.vision_model(*batch).last_hidden_state).flatten(0, 3)
            amount, is_count = keep.tolist()
            trim = self.trim.with_keep((int(amount) if is_count else amount) or None)
            features.crosstrim = trim, ids.tolist(), mask.sum(-1).tolist()
            encoded.append(features)
        return encoded

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
        encoder_outputs: Sequence[Any] = (),
    ) -> torch.Tensor:
        """One step, for the [rows] of new prompts and one more token of each running request: [rows, hidden].

        `encoder_outputs` are of `embed_multimodal`, for the new requests with images in the batch's order.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            step = _Step(torch.zeros_like(input_ids, dtype=torch.bool).unsqueeze(-1), [])
        else:
            step = _step_of(metadata[self._reads], input_ids, positions, encoder_outputs)
        return self.language_model["model"](input_ids, positions, step)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to [rows, vocabulary]."""
        return self.logits_processor(self.language_model["lm_head"], hidden_states)


def _step_of(metadata: Any, input_ids: torch.Tensor, positions: torch.Tensor, images: Sequence[Any]) -> _Step:
    """What cross-attention is to do. Without images of new requests it is tensors alone, as CUDA graphs need it.

    The `seq_lens` of a cross-attention layer's metadata are the slots that each request reads.
    """
    starts, slots = metadata.query_start_loc, metadata.seq_lens
    rows = torch.arange(len(input_ids), dtype=starts.dtype, device=starts.device)
    request = torch.searchsorted(starts[1:], rows, right=True).clamp(max=len(slots) - 1)
    sees = (slots > 0)[request]
    if not images:
        return _Step(sees.unsqueeze(-1), [])
    first = positions[starts[:-1].clamp(max=len(input_ids) - 1)]
    bounds = torch.stack([starts[:-1], starts[1:], slots, first]).T.tolist()  # the one look at the host
    new = [(slice(start, end), count) for start, end, count, position in bounds if position == 0 and count > 0]
    prompts = []
    for (place, count), features in zip(new, images, strict=True):
        trim, ids, tiles = features.crosstrim
        if trim.slots(ids, tiles) != count or place.stop - place.start < len(ids):
            raise EngineError("vLLM gave a request the images of another one.")
        prompts.append(Prompt(trim, ids, tiles, place, features))
        sees[place] = prompts[-1].sees
    return _Step(sees.unsqueeze(-1), prompts)


def _all_heads(tensor: torch.Tensor) -> torch.Tensor:
    """[1, heads of this rank, ...] of every tensor-parallel rank, side by side."""
    return tensor_model_parallel_all_gather(tensor.contiguous(), dim=1)
