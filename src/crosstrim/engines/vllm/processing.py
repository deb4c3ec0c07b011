"""From a request with pictures to what vLLM's engine is given: pixels, and as many KV slots as will be kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import torch
from transformers import BatchFeature
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from vllm.inputs import mm_enc_dec_input, mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseProcessingInfo, EncDecMultiModalProcessor

from crosstrim.engines.vllm import settings
from crosstrim.errors import ConfigError, InputError


class Info(BaseProcessingInfo):
    """What vLLM wants to know of the model's pictures."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self.trim = settings.trim_of(self.get_hf_config())
        self.pictures = settings.pictures_planned(ctx.get_mm_config())

    @property
    def skip_prompt_length_check(self) -> bool:
        """The encoder's prompt stands for slots, and slots are counted where pictures are."""
        return True

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """As many pictures as one likes."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """KV slots of the pictures of one request: of what is kept, not of what is seen."""
        return {"image": settings.largest(self.trim, self.pictures)}

    def image_processor(self) -> MllamaImageProcessorPil:
        """The checkpoint's, with Pillow as in `crosstrim.load`: torchvision's pixels differ slightly."""
        found = self.get_hf_processor().image_processor
        return found if isinstance(found, MllamaImageProcessorPil) else MllamaImageProcessorPil(**found.to_dict())


class DummyInputs(BaseDummyInputsBuilder[Info]):
    """The largest request that memory is planned for; vLLM measures with it."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One image token a picture."""
        return "<|image|>" * self.info.pictures

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Pictures that fill all tiles."""
        vision = self.info.get_hf_config().vision_config
        width = vision.image_size * vision.max_num_tiles
        return {"image": self._get_dummy_images(width=width, height=vision.image_size, num_images=self.info.pictures)}


class Processor(EncDecMultiModalProcessor[Info]):
    """Makes one item of all pictures of a request, and its placeholder as long as what will be kept of them.

    vLLM takes the placeholder's length for the number of encoder tokens: so many slots it allocates, in the group of
    the cross-attention layers alone, and so many it reads.
    """

    skip_decoder_start_token = True

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Prepare a request.

        Args:
            inputs: vLLM's `ProcessorInputs`: the prompt's ids, the pictures, and `mm_processor_kwargs`.
            timing_ctx: of vLLM.

        Raises:
            ConfigError: the request asks for a trim that it cannot have.
            InputError: the pictures do not fit the prompt, or cannot be read.
        """
        ids, items = list(inputs.prompt), inputs.mm_data_items.get("image")
        pictures = items.get_all() if items else []
        trim = settings.for_request(self.info.trim, self._options(inputs.hf_processor_mm_kwargs))
        settings.check_pictures(trim, ids, len(pictures))
        if not pictures:
            return mm_enc_dec_input(mm_input([], MultiModalKwargsItems({}), {}, {}), ids)
        with timing_ctx.record("apply_hf_processor"):
            prepared = self._prepare(pictures)
        tiles = prepared["aspect_ratio_mask"][0].sum(-1).tolist()
        keep, kept = trim.config.keep, trim.slots(ids, tiles)
        prepared["prompt_ids"] = torch.tensor([ids])
        prepared["keep"] = torch.tensor([[keep or 0, isinstance(keep, int)]], dtype=torch.float64)
        items = MultiModalKwargsItems.from_hf_inputs(prepared, self._get_mm_fields_config(prepared, {}))
        placeholders = {"image": [PlaceholderRange(offset=0, length=kept)]}
        # What is kept depends on the question too, so that nothing may ever be taken for the same.
        encoder = mm_input([0] * kept, items, {"image": [uuid4().hex]}, placeholders)
        return mm_enc_dec_input(encoder, ids)

    def _options(self, options: Mapping[str, Any]) -> Any:
        merged = self.info.ctx.get_merged_mm_kwargs(options)
        others = sorted(set(merged) - {"crosstrim"})
        if others:
            raise ConfigError(
                f"mm_processor_kwargs has {others[0]!r}, which would change the picture's tiles; it takes "
                '"crosstrim" alone.'
            )
        return merged.get("crosstrim")

    def _prepare(self, pictures: list[Any]) -> BatchFeature:
        try:
            prepared = self.info.image_processor()(images=[pictures], return_tensors="pt")
        except Exception as error:  # whatever transformers and Pillow have against a picture
            raise InputError(f"a picture could not be read: {type(error).__name__}: {error}") from error
        prepared["pixel_values"] = prepared["pixel_values"].to(self.info.ctx.model_config.dtype)
        return prepared

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> dict[str, Any]:
        """All pictures of the request are one item."""
        there, here = ("pixel_values", "aspect_ratio_ids"), ("aspect_ratio_mask", "prompt_ids", "keep")
        return {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=name in here) for name in (*there, *here)
        }

    def create_encoder_prompt(self, prompt: Any, mm_items: Any) -> Any:
        """Not called: `apply` does all."""
        raise NotImplementedError

    def _get_prompt_updates(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError
