"""How often a prompt makes the host wait for the GPU, as torch itself tells."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from transformers import DynamicCache

import crosstrim
from crosstrim.models.names import cache_keyword
from tests.support import tiny
from tests.support.gpu import REHEARSAL, on_device
from tests.support.tiny import Image

pytestmark = pytest.mark.skipif(
    REHEARSAL, reason="a CPU waits for nothing; tests/trimming/test_looks.py counts there"
)
TRIMS = [{}, {"k": 0.3}, {"keep": 0.3}, {"keep": 0.3, "merge": True}, {"keep": 0.3, "kv_dtype": "int8"}]


def waits(model, batch, trim):
    """Of one prompt, without those of a first one, which may compile and allocate."""
    with torch.no_grad(), trim:
        for _ in range(2):
            cache = DynamicCache(config=model.config.text_config)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    model(**batch, **{cache_keyword(): cache})
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in told)


@pytest.mark.parametrize("options", TRIMS, ids=str)
def test_a_prompt_waits_once_more_than_untrimmed(model, dtype, options):
    batch = on_device(tiny.inputs([2, Image(2), 5], [1, Image(4), 4]), dtype)
    untrimmed = waits(model, batch, contextlib.nullcontext())
    assert waits(model, batch, crosstrim.trim(model, **options)) <= untrimmed + 1
