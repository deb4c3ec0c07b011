"""From a request with pictures to what vLLM's engine is given: pixels, and as many KV slots as will be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import uuid4

import torch
from transformers import BatchFeature
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from vllm.inputs import mm_enc_dec_input, mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseProcessingInfo, EncDecMultiModalProcessor

from crosstrim.engines.prompt import PromptTrim
from crosstrim.engines.vllm.settings import trim_of


class Info(BaseProcessingInfo):
    """What vLLM wants to know of the model's pictures."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self.trim = trim_of(self.get_hf_config())

    @property
    def skip_prompt_length_check(self) -> bool:
        """The encoder's prompt is of our own making; how many slots it takes is checked elsewhere."""
        return True

    @property
    def pictures(self) -> int:
        """Pictures of one request that memory is planned for."""
        limits = self.ctx.get_mm_config().limit_per_prompt
        return self.allowed_mm_limits["image"] if "image" in limits else 1

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of pictures."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """KV slots of a request whose pictures fill all tiles: what is kept of them."""
        ids = [self.trim.image_token_id] * self.pictures
        return {"image": self.trim.slots(ids, [self.trim.geometry.tiles_per_image] * self.pictures)}

    def image_processor(self) -> MllamaImageProcessorPil:
        """That of the checkpoint, with Pillow: torchvision's pixels differ slightly."""
        found = self.get_hf_processor().image_processor
        if isinstance(found, MllamaImageProcessorPil):
            return found
        return MllamaImageProcessorPil.from_dict(found.to_dict())


class DummyInputs(BaseDummyInputsBuilder[Info]):
    """The largest request, for vLLM to measure memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One `<|image|>` a picture."""
        return "<|image|>" * self.info.pictures

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Pictures of all tiles."""
        side = self.info.get_hf_config().vision_config.image_size * 2
        return {"image": self._get_dummy_images(width=side, height=side, num_images=self.info.pictures)}


class Processor(EncDecMultiModalProcessor[Info]):
    """Makes of all pictures of a request one item, with a placeholder as long as what will be kept."""

    skip_decoder_start_token = True

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Prepare a request that brings pictures."""
        ids, pictures = list(inputs.prompt), inputs.mm_data_items["image"].get_all()
        trim = self._trim(inputs.hf_processor_mm_kwargs)
        with timing_ctx.record("apply_hf_processor"):
            prepared = self.info.image_processor()(images=[pictures], return_tensors="pt")
        tiles = prepared["aspect_ratio_mask"][0].sum(-1).tolist()
        keep = trim.config.keep
        kept = trim.slots(ids, tiles)
        prepared = {
            "pixel_values": prepared["pixel_values"].to(self.info.ctx.model_config.dtype),
            "aspect_ratio_ids": prepared["aspect_ratio_ids"],
            "aspect_ratio_mask": prepared["aspect_ratio_mask"],
            "prompt_ids": torch.tensor([ids]),
            "keep": torch.tensor([[0.0 if keep is None else keep, isinstance(keep, int)]], dtype=torch.float64),
        }
        fields = {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=name in ("prompt_ids", "keep"))
            for name in prepared
        }
        encoder = mm_input(
            prompt_token_ids=[0] * kept,
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(BatchFeature(prepared), fields),
            mm_hashes={"image": [uuid4().hex]},
            mm_placeholders={"image": [PlaceholderRange(offset=0, length=kept)]},
        )
        return mm_enc_dec_input(encoder, ids)

    def _trim(self, options: Mapping[str, Any]) -> PromptTrim:
        asked = self.info.ctx.get_merged_mm_kwargs(options).get("crosstrim") or {}
        return replace(self.info.trim, config=replace(self.info.trim.config, **asked))

    def create_encoder_prompt(self, prompt: Any, mm_items: Any) -> Any:
        raise NotImplementedError

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        raise NotImplementedError

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        raise NotImplementedError
