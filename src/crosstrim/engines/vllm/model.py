"""Mllama of vLLM's layers, with trimmed image features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
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

from crosstrim.engines.prompt import PromptTrim, attend, hidden_after
from crosstrim.engines.vllm.processing import DummyInputs, Info, Processor
from crosstrim.engines.vllm.settings import trim_of
from crosstrim.models import compat


@dataclass
class Prompt:
    """One request with images whose prompt is computed in this step."""

    rows: slice
    token_ids: torch.Tensor
    features: torch.Tensor
    visible: torch.Tensor
    prompt_rows: int
    trim: PromptTrim
    kept: torch.Tensor | None = None


@dataclass
class Step:
    """sees: [rows, 1] bool"""

    sees: torch.Tensor
    prompts: list[Prompt]


class Heads(nn.Module):
    """vLLM's attention, for heads of any size: its CPU kernels know a few sizes, and others get zeros at their end."""

    def __init__(self, kind: type[Attention], config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.size = config.hidden_size // config.num_attention_heads
        self.queries, self.keys = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        padded = self.size
        if current_platform.is_cpu():
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            padded = min(size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= self.size)
        self.missing = padded - self.size
        self.attn = kind(
            self.queries,
            padded,
            self.size**-0.5,
            num_kv_heads=self.keys,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor | None, values: torch.Tensor | None
    ) -> torch.Tensor:
        padded = [None if heads is None else F.pad(heads, (0, self.missing)) for heads in (queries, keys, values)]
        return self.attn(*padded).view_as(padded[0])[..., : self.size]


class SelfAttention(nn.Module):
    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.heads = Heads(Attention, config, vllm_config, f"{prefix}.attn")
        size = self.heads.size
        self.qkv_proj = QKVParallelLinear(
            hidden, size, heads, config.num_key_value_heads, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(heads * size, hidden, bias=False, prefix=f"{prefix}.o_proj")
        self.rotary = get_rope(
            size, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
        heads, (rows, _) = self.heads, hidden.shape
        parts = [heads.queries * heads.size, heads.keys * heads.size, heads.keys * heads.size]
        queries, keys, values = self.qkv_proj(hidden)[0].split(parts, dim=-1)
        queries, keys = self.rotary(positions, queries, keys)
        queries, keys, values = (part.reshape(rows, -1, heads.size) for part in (queries, keys, values))
        return self.o_proj(heads(queries, keys, values).flatten(1))[0]


class TrimmedCrossAttention(nn.Module):
    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str, leads: bool) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.leads = leads
        self.heads = Heads(CrossAttention, config, vllm_config, f"{prefix}.attn")
        size = self.heads.size

        def project(name: str, count: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(hidden, count * size, bias=False, prefix=f"{prefix}.{name}")

        self.q_proj = project("q_proj", heads)
        self.k_proj = project("k_proj", config.num_key_value_heads)
        self.v_proj = project("v_proj", config.num_key_value_heads)
        self.o_proj = RowParallelLinear(heads * size, hidden, bias=False, prefix=f"{prefix}.o_proj")
        self.q_norm, self.k_norm = (RMSNorm(size, eps=config.rms_norm_eps) for _ in range(2))

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
        queries = self._split(self.q_proj, hidden, self.q_norm)
        written = [self._prompt(queries[prompt.rows], prompt) for prompt in step.prompts]
        if written:
            keys, values, attended = zip(*written, strict=True)
            output = self.heads(queries, torch.cat(keys), torch.cat(values))
            for prompt, own in zip(step.prompts, attended, strict=True):
                output[prompt.rows] = own
        else:
            output = self.heads(queries, None, None)
        output = torch.where(step.sees.unsqueeze(-1), output, 0)
        return self.o_proj(output.flatten(1))[0]

    def _prompt(self, queries: torch.Tensor, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.leads:
            keys, values = self._project(prompt.features)
            mine = slice(prompt.prompt_rows)
            kept = prompt.kept = prompt.trim.choose(
                prompt.token_ids[mine], prompt.visible[mine], queries[mine], keys, values, _all_heads
            )
            visible = hidden_after(prompt.visible, kept, prompt.prompt_rows)
            return keys[kept], values[kept], attend(queries, keys, values, visible)
        kept = prompt.kept
        keys, values = self._project(prompt.features[kept])
        return keys, values, attend(queries, keys, values, prompt.visible[:, kept])

    def _project(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._split(self.k_proj, features, self.k_norm), self._split(self.v_proj, features, None)

    def _split(self, projection: nn.Module, states: torch.Tensor, norm: Any) -> torch.Tensor:
        heads = projection(states)[0].reshape(len(states), -1, self.heads.size)
        return heads if norm is None else norm(heads.contiguous())


class DecoderLayer(nn.Module):
    """A layer of the decoder; one that crosses to the images weighs what it adds by gates."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str, index: int) -> None:
        super().__init__()
        crossing = sorted(config.cross_attention_layers)
        self.crosses = index in crossing
        if self.crosses:
            self.cross_attn = TrimmedCrossAttention(
                config, vllm_config, f"{prefix}.cross_attn", leads=index == crossing[0]
            )
            self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
            self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))
        else:
            self.self_attn = SelfAttention(config, vllm_config, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, prefix=f"{prefix}.mlp"
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
        attention = self.cross_attn if self.crosses else self.self_attn
        attended = attention(self.input_layernorm(hidden), positions, step)
        if not self.crosses:
            hidden = hidden + attended
            return hidden + self.mlp(self.post_attention_layernorm(hidden))
        hidden = hidden + self.cross_attn_attn_gate.tanh() * attended
        added = torch.where(step.sees, self.mlp(self.post_attention_layernorm(hidden)), 0)
        return hidden + self.cross_attn_mlp_gate.tanh() * added


class TextModel(nn.Module):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size + 8, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, vllm_config, f"{prefix}.layers.{index}", index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, positions, step)
        return self.norm(hidden)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class LanguageModel(nn.Module):
    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.model = TextModel(config, vllm_config, f"{prefix}.model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=f"{prefix}.lm_head")


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class MllamaForConditionalGeneration(nn.Module, SupportsMultiModal):
    """Llama-3.2-Vision."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.vision_model.": "vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.trim = trim_of(config)
        self.vision_model = MllamaVisionModel._from_config(config.vision_config)
        compat.repair_vision_tower(self.vision_model)
        self.multi_modal_projector = nn.Linear(
            config.vision_config.vision_output_dim, config.text_config.hidden_size, bias=True
        )
        self.language_model = LanguageModel(config.text_config, vllm_config, f"{prefix}.language_model".strip("."))
        self.logits_processor = LogitsProcessor(config.text_config.vocab_size)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<|image|>" if modality == "image" else None

    def embed_multimodal(self, **inputs: Any) -> Sequence[torch.Tensor]:
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "prompt_ids", "keep")
        outputs = []
        for pixels, ids, mask, prompt_ids, keep in zip(*(inputs[name] for name in names), strict=True):
            states = self.vision_model(pixels.unsqueeze(0), ids.unsqueeze(0), mask.unsqueeze(0)).last_hidden_state
            features = self.multi_modal_projector(states).flatten(0, 3)
            amount, counts = keep.tolist()
            config = replace(self.trim.config, keep=(int(amount) if counts else amount) or None)
            features.crosstrim = (
                replace(self.trim, config=config), prompt_ids.tolist(), mask.sum(-1).tolist()
            )
            outputs.append(features)
        return outputs

    def embed_input_ids(self, input_ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return self.language_model.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        encoder_outputs: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        return self.language_model.model(input_ids, positions, self._step(input_ids, positions, encoder_outputs))

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(self.language_model.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def _step(self, input_ids: torch.Tensor, positions: torch.Tensor, images: Sequence[torch.Tensor]) -> Step:
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return Step(torch.zeros_like(input_ids, dtype=torch.bool).unsqueeze(-1), [])
        first = next(layer for layer in self.language_model.model.layers if layer.crosses)
        metadata = metadata[first.cross_attn.heads.attn.layer_name]
        starts, lengths = metadata.query_start_loc, metadata.seq_lens
        rows = torch.arange(len(input_ids), device=starts.device, dtype=starts.dtype)
        request = torch.searchsorted(starts[1:], rows, right=True).clamp(max=len(lengths) - 1)
        sees = (lengths > 0)[request]
        prompts = []
        if images:
            bounds = torch.stack([starts[:-1], starts[1:], lengths, positions[starts[:-1].clamp(max=len(input_ids) - 1)]]).T.tolist()
            spans = [(start, end, length) for start, end, length, position in bounds if position == 0 and length > 0]
            for (start, end, length), features in zip(spans, images, strict=True):
                trim, ids, tiles = features.crosstrim
                visible = trim.visible(ids, tiles)
                visible = torch.cat([visible, visible[-1:].expand(end - start - len(ids), -1)])
                sees[start:end] = visible.any(-1).to(sees.device)
                prompts.append(Prompt(slice(start, end), input_ids[start:end], features, visible.to(features.device), len(ids), trim))
        return Step(sees.unsqueeze(-1), prompts)


def _all_heads(tensor: torch.Tensor) -> torch.Tensor:
    return tensor_model_parallel_all_gather(tensor.contiguous(), dim=1)
