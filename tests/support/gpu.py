"""The device that the tests of a GPU run on, and generations there."""

from __future__ import annotations

import os

DEVICE = os.environ.get("CROSSTRIM_TEST_DEVICE") or "cuda"
"""Set CROSSTRIM_TEST_DEVICE=cpu to rehearse without a GPU; what the tests say of one is then not tested."""

REHEARSAL = not DEVICE.startswith("cuda")
NEW_TOKENS = 5


def on_device(batch, dtype):
    moved = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    return moved | {"pixel_values": moved["pixel_values"].to(dtype)}


def run(model, batch, **options):
    options = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**batch, **options)
