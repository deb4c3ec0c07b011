"""Prompts, and passes and generations on them, that several tests of the trim share."""

from __future__ import annotations

import contextlib

import torch
import transformers
from packaging.version import Version
from transformers import CompileConfig

from tests.support.tiny import Image

OLD_TRANSFORMERS = Version(transformers.__version__) < Version("5.23")
SINGLE = [2, Image(4), 9]
RAGGED = [[2, Image(4), 9], [1, Image(1, seed=1), 4]]


def grow(batch, ids):
    """The batch with more text at the end, its mask rows copied from the last one, as generate does."""
    grown = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "cross_attention_mask")}
    grown["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    grown["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(ids)], dim=1)
    last = batch["cross_attention_mask"][:, -1:].expand(-1, ids.shape[1], -1, -1)
    grown["cross_attention_mask"] = torch.cat([batch["cross_attention_mask"], last], dim=1)
    return grown


def split_turns(two, length):
    """A prompt with two images as a first pass with one image and a second pass that appends the other."""
    images = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    first = {name: two[name][:, :1] for name in images}
    first |= {name: two[name][:, :length] for name in ("input_ids", "attention_mask")}
    first["cross_attention_mask"] = two["cross_attention_mask"][:, :length, :1]
    second = {name: two[name][:, 1:] for name in images}
    second["input_ids"] = two["input_ids"][:, length:]
    second["attention_mask"] = two["attention_mask"]
    second["cross_attention_mask"] = two["cross_attention_mask"][:, length:]
    if OLD_TRANSFORMERS:  # which slices the rows itself
        second["cross_attention_mask"] = two["cross_attention_mask"]
    return first, second


@contextlib.contextmanager
def hooked(model, layers, hook):
    """Within, the hook runs before each of these layers of the decoder, and may change what it is given."""
    stack = model.model.language_model.layers
    handles = [stack[index].register_forward_pre_hook(hook, with_kwargs=True) for index in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def hidden_from(model, layers, start, dropped):
    """Within, the text rows from `start` on do not see the `dropped` features in `layers`."""

    def hide(module, args, kwargs):
        mask = kwargs["cross_attention_mask"].clone()
        mask[:, :, start:] = mask[:, :, start:].masked_fill(dropped[:, None, None], torch.finfo(mask.dtype).min)
        return args, kwargs | {"cross_attention_mask": mask}

    with hooked(model, layers, hide):
        yield


def generate(model, batch, **options):
    return model.generate(**batch, max_new_tokens=6, **options)


def compiled_config():
    """Backend "eager" traces and guards as every backend does, and needs no compiler of the machine's."""
    config = CompileConfig(fullgraph=True, dynamic=False, mode="default", backend="eager")
    config._compile_all_devices = True
    return config


def kept(trimmed):
    return [[image.kept_indices for image in row] for row in trimmed.report().samples]


def hooks_on(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
