"""SGLang's Mllama with trimmed image features.

Prompts are computed here, request by request: the first cross-attention layer sees every visible feature, scores
them, and writes the keys and values of those that stay into the first of the request's image slots. The later layers
project, write and read nothing else. Decoding is SGLang's own: it reads the first `encoder_len` slots of a request.
"""

from __future__ import annotations

import copy
import os
from array import array
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.models import mllama as upstream
from sglang.srt.runtime_context import get_parallel, get_server_args
from sglang.srt.utils import add_prefix

from crosstrim.engines.prompt import Prompt, PromptTrim, cross_attend
from crosstrim.engines.sglang import slots
from crosstrim.engines.sglang.launch import check_server
from crosstrim.engines.sglang.settings import Settings


@dataclass(frozen=True)
class Retained:
    """What a request keeps for as long as it lives; a request that is prefilled again keeps the same.

    Attributes:
        indices: [K] int64, ascending, over all features of the request's images, padding tiles counted.
        free_slots: whether image slots beyond K go back to the pool.
    """

    indices: torch.Tensor
    free_slots: bool


class SlottedPrompt(Prompt):
    """A prompt in SGLang.

    Attributes:
        images: SGLang's record of its images, which lives as long as the request.
        slots: [S] KV slots of its images, S >= K.
    """

    images: Any
    slots: torch.Tensor


class TrimmedCrossAttention(upstream.MllamaTextCrossAttention):
    """Cross-attention that reads only what a request keeps."""

    leads = False  # the first one sees all, and chooses

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        cross_attention_states: list[SlottedPrompt] | None,
        forward_batch: Any,
    ) -> torch.Tensor:
        """Attend to the images.

        Args:
            hidden_states: [rows, hidden] of all requests.
            attention_mask: when decoding, the batch with the lengths that cross-attention is to read.
            cross_attention_states: the requests with images when this is a prompt, None when decoding.
            forward_batch: of SGLang.
        """
        queries = self._heads(hidden_states, 0, self.q_norm)
        if cross_attention_states is None:
            output = self.attn(queries, None, None, attention_mask).view_as(queries)
            output = output.masked_fill((attention_mask.encoder_lens == 0).view(-1, 1, 1), 0)
        else:
            output = torch.zeros_like(queries)
            all_heads = _all_heads if self.leads else None
            new = cross_attend(cross_attention_states, queries, self._project, all_heads)
            for prompt, (keys, values, attended) in zip(cross_attention_states, new, strict=True):
                self._write(prompt, keys, values)
                output[prompt.rows] = attended
        return self.o_proj(output.flatten(1))[0]

    def _project(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._heads(features, 1, self.k_norm), self._heads(features, 2, None)

    def _heads(self, states: torch.Tensor, part: int, norm: Any) -> torch.Tensor:
        """[rows, heads of this rank, D]: part 0, 1 or 2 of queries, keys and values."""
        projected, _ = self.qkv_proj(states)
        projected = projected.split([self.q_local_size, self.kv_local_size, self.kv_local_size], dim=-1)[part]
        heads = projected.reshape(-1, self.head_dim)
        return (heads if norm is None else norm(heads)).view(len(states), -1, self.head_dim)

    def _write(self, prompt: SlottedPrompt, keys: torch.Tensor, values: torch.Tensor) -> None:
        location = KVWriteLoc(prompt.slots[: len(keys)], None)
        get_attn_backend().token_to_kv_pool.set_kv_buffer(self.attn, location, keys, values)


class MllamaForConditionalGeneration(upstream.MllamaForConditionalGeneration):
    """SGLang's class of the same name, trimmed."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        text = config.text_config
        settings = Settings.read(getattr(config, "crosstrim", None) or {}, os.environ)
        check_server(resolved_view(get_server_args()), settings)
        self.trim = PromptTrim.of(settings.config, config)
        self._free_slots = settings.free_slots
        if self._free_slots and settings.config.count_depends_on_prompt:
            slots.check_hooked()
        for place, index in enumerate(sorted(text.cross_attention_layers)):
            layer = self.language_model.model.layers[index]
            name = add_prefix(f"language_model.model.layers.{index}.cross_attn", prefix)
            layer.cross_attn = TrimmedCrossAttention(text, index, quant_config=quant_config, prefix=name)
            layer.cross_attn.leads = place == 0
        self.vision_model.transformer.register_forward_hook(_AsManyStatesAsAskedFor())

    def pad_input_ids(self, input_ids: array[int], mm_inputs: Any) -> array[int]:
        """Put as many ids before the prompt as its images need KV slots; padding tiles need none.

        SGLang's record of the images takes the prompt along, so that nobody has to ask the device for it.
        """
        mm_inputs.crosstrim_asked = list(input_ids)
        mm_inputs.num_image_tokens = self.trim.slots(input_ids, _tiles(mm_inputs))
        values = array("q", (item.pad_value for item in mm_inputs.mm_items))
        padding = values * (mm_inputs.num_image_tokens // len(values) + 1)
        return padding[: mm_inputs.num_image_tokens] + input_ids

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        """One step of SGLang's: prompts, or one more token of each running request."""
        decoding = forward_batch.forward_mode.is_decode()
        prompts = [] if decoding else self._prompts(forward_batch)
        sees_something = (
            forward_batch.encoder_lens != 0 if decoding else torch.zeros_like(input_ids, dtype=torch.bool)
        )
        for prompt in prompts:
            sees_something[prompt.rows] = prompt.sees
        hidden_states = self.language_model(
            input_ids=input_ids,
            positions=positions,
            cross_attention_states=None if decoding else prompts,
            cross_attention_mask=self._as_read(forward_batch) if decoding else None,
            full_text_row_masked_out_mask=sees_something.unsqueeze(-1),
            forward_batch=forward_batch,
            skip_cross_attention=max(forward_batch.encoder_lens_cpu) == 0,
        )
        for prompt in prompts:
            assert prompt.kept is not None  # the first cross-attention layer has chosen
            prompt.images.crosstrim_retained = Retained(prompt.kept, self._free_slots)
        return self.logits_processor(input_ids, hidden_states, self.language_model.lm_head, forward_batch)

    def _prompts(self, forward_batch: Any) -> list[SlottedPrompt]:
        """The requests with images among a batch of prompts."""
        pixels, ratio_ids, ratio_mask, _ = self._batch_image_inputs(forward_batch)
        if pixels is None:
            return []
        features, _ = self.multi_modal_projector(self.vision_model(pixels, ratio_ids, ratio_mask))
        lengths = forward_batch.encoder_lens_cpu
        features_of_each = iter(features.flatten(1, 3))
        slots_of_each = iter(forward_batch.encoder_out_cache_loc.split([length for length in lengths if length]))
        prompts, end = [], 0
        for images, length, count in zip(
            forward_batch.mm_inputs, lengths, forward_batch.extend_seq_lens_cpu, strict=True
        ):
            start, end = end, end + count
            if length == 0:  # text alone
                continue
            asked = images.crosstrim_asked[:count]  # SGLang may have cut it
            prompt = SlottedPrompt(self.trim, asked, _tiles(images), slice(start, end), next(features_of_each))
            prompt.images, prompt.slots = images, next(slots_of_each)
            prompt.kept = None if (retained := _retained(images)) is None else retained.indices
            prompts.append(prompt)
        return prompts

    def _as_read(self, forward_batch: Any) -> Any:
        """The batch with as many slots a request as it keeps, where the others were not given back."""
        if self._free_slots:
            return forward_batch
        lengths = [0 if one is None else len(one.indices) for one in map(_retained, forward_batch.mm_inputs)]
        view = copy.copy(forward_batch)
        view.encoder_lens = torch.tensor(lengths).to(forward_batch.encoder_lens, non_blocking=True)
        return view


class _AsManyStatesAsAskedFor:
    """Forward hook on the local vision encoder.

    Asked for the state before the last layer, SGLang adds the one after it. Real checkpoints never ask, "mini" does.
    """

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        last, states = output
        return last, states[: len(module.output_hidden_states)]


def _all_heads(tensor: torch.Tensor) -> torch.Tensor:
    """[1, heads of this rank, ...] of every tensor-parallel rank, side by side."""
    return get_parallel().tp_group.all_gather(tensor.contiguous(), dim=1)


def _tiles(images: Any) -> list[int]:
    """Real tiles of each image of a request, from SGLang's record of them."""
    masks = [item.model_specific_data["aspect_ratio_mask"][0] for item in images.mm_items]
    return [int(tiles) for mask in masks for tiles in mask.sum(-1)]


def _retained(images: Any) -> Retained | None:
    """What a request that was a prompt before keeps."""
    return None if images is None else getattr(images, "crosstrim_retained", None)


EntryClass = MllamaForConditionalGeneration
