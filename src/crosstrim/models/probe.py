"""Parts of Mllama too small to matter, to see what the installed transformers does with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from crosstrim.models import names
from crosstrim.models.interface import KEYWORD, Attended, Call, Taken


def text_config() -> Any:
    """Of one layer, which attends to images."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    return MllamaTextConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        cross_attention_layers=[0],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def model() -> nn.Module:
    """An `MllamaModel` with that one layer."""
    from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaVisionConfig
    from transformers.models.mllama.modeling_mllama import MllamaModel

    vision = MllamaVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        attention_heads=1,
        num_hidden_layers=1,
        num_global_layers=1,
        intermediate_layers_indices=[0],
        vision_output_dim=16,
        image_size=4,
        patch_size=4,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
    )
    config = MllamaConfig(vision_config=vision, text_config=text_config())
    return built(lambda: MllamaModel._from_config(config, attn_implementation="sdpa"))


def inputs() -> dict[str, torch.Tensor]:
    """Of two tokens and three image features, for `model`."""
    return {
        "input_ids": torch.tensor([[1, 3]], device="cpu"),
        "cross_attention_states": ramp(1, 2, 1, 3, 8),
    }


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, without touching the caller's random state, device or dtype."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return build().to(torch.float32).eval()


def ramp(first: float, last: float, *shape: int) -> torch.Tensor:
    """Numbers to read: on the CPU and in float32, as they are, whatever the caller made torch's defaults."""
    return torch.linspace(first, last, math.prod(shape), dtype=torch.float32, device="cpu").reshape(shape)


class _Witness:
    """A pass that only sees whether it arrives."""

    arrived = False

    def attend(self, call: Call) -> Attended:
        self.arrived = True
        return call.attend(call.mask)


@lru_cache(maxsize=1)
@torch.no_grad()
def check_interface() -> None:
    """Run a tiny Mllama of the installed transformers, and see that a pass reaches the attention function.

    Raises:
        IncompatibleTransformersError: it does not, or a name that trimming needs is gone.
    """
    keyword, witness = names.cache_keyword(), _Witness()
    try:
        tiny = cast(Any, model())
        Taken([tiny.language_model.layers[0].cross_attn])
        tiny(**inputs(), **{keyword: None, KEYWORD: witness}, use_cache=False)
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        raise names.incompatible(f"a keyword of a forward pass breaks its Mllama ({error})") from error
    if not witness.arrived:
        raise names.incompatible("a keyword of a forward pass does not reach the attention of Mllama's layers")
