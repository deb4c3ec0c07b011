"""From a request with images to what vLLM's engine is given: pixels, and as many KV slots as will be kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any
from uuid import uuid4

import torch
from transformers import BatchFeature
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from vllm.inputs import mm_enc_dec_input, mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseProcessingInfo, EncDecMultiModalProcessor

from crosstrim.engines.prompt import PromptTrim
from crosstrim.engines.vllm import launch
from crosstrim.errors import ConfigError, InputError


class Info(BaseProcessingInfo):
    """What vLLM wants to know of the model's images."""

    skip_prompt_length_check = True  # of the encoder's prompt, which stands for slots

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self.trim = launch.trim_of(self.get_hf_config())
        self.images = launch.images_planned(ctx.get_mm_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """As many images as one likes."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """KV slots of the images of one request: of what is kept, not of what is seen."""
        return {"image": self.trim.largest(self.images)}

    @cached_property
    def image_processor(self) -> MllamaImageProcessorPil:
        """The checkpoint's, with Pillow as in `crosstrim.load`: torchvision's pixels differ slightly."""
        found = self.get_hf_processor().image_processor
        return found if isinstance(found, MllamaImageProcessorPil) else MllamaImageProcessorPil(**found.to_dict())


class DummyInputs(BaseDummyInputsBuilder[Info]):
    """The largest request that memory is planned for; vLLM measures with it."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One image token an image."""
        return "<|image|>" * self.info.images

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Images that fill all tiles."""
        vision, count = self.info.get_hf_config().vision_config, self.info.images
        sizes = {"width": vision.image_size * vision.max_num_tiles, "height": vision.image_size}
        return {"image": self._get_dummy_images(**sizes, num_images=count)}


class Processor(EncDecMultiModalProcessor[Info]):
    """Makes one item of all images of a request, and its placeholder as long as what will be kept of them.

    So many encoder tokens vLLM counts, allocates slots for, in the cross-attention layers alone, and reads.
    """

    skip_decoder_start_token = True

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Prepare a request: the prompt's ids, its images, and `mm_processor_kwargs`, all in vLLM's `inputs`.

        Raises:
            ConfigError: the request asks for a trim that it cannot have.
            InputError: the images do not fit the prompt, or cannot be read.
        """
        ids, given = list(inputs.prompt), inputs.mm_data_items.get("image")
        images = given.get_all() if given else []
        trim = self._trim(self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs))
        trim.check_images(ids, len(images))
        if not images:
            return mm_enc_dec_input(mm_input([], MultiModalKwargsItems({}), {}, {}), ids)
        with timing_ctx.record("apply_hf_processor"):
            prepared = self._prepare(images)
        keep, kept = trim.config.keep, trim.slots(ids, prepared["aspect_ratio_mask"][0].sum(-1).tolist())
        prepared["prompt_ids"] = torch.tensor([ids])
        prepared["keep"] = torch.tensor([[keep or 0, isinstance(keep, int)]], dtype=torch.float64)
        items = MultiModalKwargsItems.from_hf_inputs(prepared, self._get_mm_fields_config(prepared, {}))
        # What is kept depends on the question too, so that no two images may be taken for the same.
        place = {"image": [PlaceholderRange(offset=0, length=kept)]}
        return mm_enc_dec_input(mm_input([0] * kept, items, {"image": [uuid4().hex]}, place), ids)

    def _trim(self, options: Mapping[str, Any]) -> PromptTrim:
        """The request's own: {"crosstrim": {"keep": 0.5}}, or None to keep all that can be seen."""
        if not options:
            return self.info.trim
        asked = options.get("crosstrim")
        if set(options) != {"crosstrim"} or not isinstance(asked, Mapping) or set(asked) != {"keep"}:
            raise ConfigError(
                f'mm_processor_kwargs={dict(options)!r} must be of the form {{"crosstrim": {{"keep": 0.5}}}}.'
            )
        return self.info.trim.with_keep(asked["keep"])

    def _prepare(self, images: list[Any]) -> BatchFeature:
        try:
            prepared = self.info.image_processor(images=[images], return_tensors="pt")
        except Exception as error:  # whatever transformers and Pillow have against an image
            raise InputError(f"a picture could not be read: {type(error).__name__}: {error}") from error
        prepared["pixel_values"] = prepared["pixel_values"].to(self.info.ctx.model_config.dtype)
        return prepared

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> dict[str, Any]:
        there, here = ("pixel_values", "aspect_ratio_ids"), ("aspect_ratio_mask", "prompt_ids", "keep")
        return {name: MultiModalFieldConfig.batched("image", keep_on_cpu=name in here) for name in there + here}

    def create_encoder_prompt(self, prompt: Any, mm_items: Any) -> Any:
        """Not called: `apply` does all."""
        raise NotImplementedError

    def _get_prompt_updates(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError
