"""A batch of prompts as the model takes it from SGLang, which it does without a look at the device."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch

from crosstrim import TrimConfig
from crosstrim.engines.prompt import PromptTrim
from crosstrim.method.geometry import Geometry
from tests.support.watched_device import DEVICE, device

pytestmark = pytest.mark.sglang

IMAGE = 9
GEOMETRY = Geometry(features_per_tile=5, tiles_per_image=4, query_heads=4, key_value_heads=2, head_size=8)


def images(tiles):
    mask = (torch.arange(4) < tiles).int().view(1, 1, 4)
    return SimpleNamespace(mm_items=[SimpleNamespace(model_specific_data={"aspect_ratio_mask": mask}, pad_value=7)])


def test_prompts_are_known_without_asking_the_device():
    from crosstrim.engines.sglang import model

    trim = PromptTrim(TrimConfig(keep=3), GEOMETRY, IMAGE, None)
    records = [images(4), None, images(1)]
    network = SimpleNamespace(trim=trim)
    for record, ids in ((records[0], [1, IMAGE, 2]), (records[2], [IMAGE, 3])):
        padded = model.MllamaForConditionalGeneration.pad_input_ids(network, array("q", ids), record)
        assert padded.tolist() == [7, 7, 7, *ids]
    records[2].crosstrim_retained = model.Retained(torch.tensor([0, 2, 4]), free_slots=True)
    with device() as looks:
        features = torch.zeros(2, 1, 4, 5, 6).to(DEVICE)
        network._batch_image_inputs = lambda batch: (features, None, None, None)
        network.vision_model = lambda pixels, ids, mask: pixels
        network.multi_modal_projector = lambda states: (states, None)
        batch = SimpleNamespace(
            mm_inputs=records,
            encoder_lens_cpu=[3, 0, 3],
            extend_seq_lens_cpu=[3, 4, 5],  # the last one with three generated rows
            encoder_out_cache_loc=torch.arange(6).to(DEVICE),
        )
        first, second = model.MllamaForConditionalGeneration._prompts(network, batch)
        sees = [prompt.sees.values.tolist() for prompt in (first, second)]
        assert looks == []
    assert (first.rows, second.rows) == (slice(0, 3), slice(7, 12))
    assert (first.prompt_rows, second.prompt_rows) == (3, 2)
    assert sees == [[False, True, True], [True] * 5]
    assert first.kept is None
    assert second.kept.tolist() == [0, 2, 4]
    assert second.slots.values.tolist() == [3, 4, 5]
