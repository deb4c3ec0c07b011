"""What is trimmed in vLLM: by the model's config or the environment, and within that by each request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from crosstrim.config import TrimConfig
from crosstrim.engines.prompt import PromptTrim
from crosstrim.engines.settings import config_for, read_options
from crosstrim.errors import ConfigError, InputError
from crosstrim.models import mllama

ALLOW_UNTESTED = "allow_untested"


def options_of(hf_config: Any) -> dict[str, Any]:
    """What was asked for: the object "crosstrim" of the model's config, and the environment.

    Raises:
        ConfigError: an option is given in both places.
    """
    return read_options(getattr(hf_config, "crosstrim", None) or {}, os.environ, [ALLOW_UNTESTED])


def trim_of(hf_config: Any) -> PromptTrim:
    """How requests are trimmed that do not say otherwise.

    Args:
        hf_config: an `MllamaConfig`.

    Raises:
        ConfigError: an option is unknown or out of range, or cannot be had in vLLM.
    """
    options = {name: value for name, value in options_of(hf_config).items() if name != ALLOW_UNTESTED}
    has_llamas_words = hf_config.text_config.vocab_size == mllama.LLAMA_VOCABULARY_SIZE
    return PromptTrim(
        checked(config_for("vLLM", options)),
        mllama.geometry_of(hf_config),
        hf_config.image_token_index,
        mllama.LLAMA_USER_TURN_IDS if has_llamas_words else None,
    )


def checked(config: TrimConfig) -> TrimConfig:
    """The config, if how much it keeps is known before a prompt is computed.

    Raises:
        ConfigError: it is not, or the cache is to be held in a form that vLLM has no place for.
    """
    if not config.lossless and config.keep is None:
        given = f"policy={config.policy!r}" if config.k is None else f"k={config.k!r}"
        raise ConfigError(
            f"{given} lets the prompt decide how much stays, which vLLM must know before: it takes a request's blocks "
            "when it admits it. Give keep=, such as keep=0.5; `crosstrim calibrate` finds one for your questions."
        )
    if config.kv_dtype is not None:
        raise ConfigError(f"kv_dtype={config.kv_dtype!r} cannot be had in vLLM, whose cache is its own; leave it out.")
    return config


def for_request(trim: PromptTrim, options: Any) -> PromptTrim:
    """The trim of one request.

    Args:
        trim: of requests that do not say otherwise.
        options: the object "crosstrim" of the request's `mm_processor_kwargs`: {"keep": 0.5}, or {"keep": None} to
            keep all that can be seen. None: as the others.

    Raises:
        ConfigError: it is something else, or out of range.
    """
    if options is None:
        return trim
    if not isinstance(options, Mapping) or set(options) != {"keep"}:
        raise ConfigError(
            f'"crosstrim" of a request is {options!r}; it takes keep alone, as in {{"crosstrim": {{"keep": 0.5}}}}. '
            "Everything else is set when the engine starts."
        )
    keep = options["keep"]
    return replace(trim, config=replace(trim.config, keep=keep, policy=None if keep is None else trim.config.policy))


def check_pictures(trim: PromptTrim, ids: list[int], pictures: int) -> None:
    """Refuse a prompt whose last rows would not see all of its pictures: vLLM's cache holds one set for all rows.

    Args:
        trim: of the request.
        ids: of the prompt.
        pictures: that came with it.

    Raises:
        InputError: there are more or fewer `<|image|>` than pictures, or text stands between two of them.
    """
    places = [place for place, token in enumerate(ids) if token == trim.image_token_id]
    if len(places) != pictures:
        raise InputError(
            f"the prompt has {len(places)} image tokens (<|image|>) for {pictures} pictures; give one for each."
        )
    if places and places[-1] - places[0] != len(places) - 1:
        raise InputError(
            "the prompt has text between two pictures, so that what follows the last picture sees only that one; in "
            "vLLM all pictures of a request must stand together, in one turn. Ask again with one picture, or with "
            "all of them side by side."
        )


def pictures_planned(multimodal_config: Any) -> int:
    """Pictures of one request that memory is planned for: what --limit-mm-per-prompt says, or one.

    Args:
        multimodal_config: vLLM's.
    """
    given = "image" in multimodal_config.limit_per_prompt
    return int(multimodal_config.get_limit_per_prompt("image")) if given else 1


def largest(trim: PromptTrim, pictures: int) -> int:
    """KV slots of so many pictures that fill all of their tiles."""
    return trim.slots([trim.image_token_id] * pictures, [trim.geometry.tiles_per_image] * pictures)
