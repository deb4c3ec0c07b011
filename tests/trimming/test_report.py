from __future__ import annotations

import pytest
import torch

import crosstrim
from crosstrim.trimming.report import format_bytes
from tests.support import tiny
from tests.support.tiny import Image

SAMPLES = [2, Image(4), 9], [1, Image(2, seed=1), 14]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (209846272, "200 MiB")),
        *((1023 * 2**20, "1023 MiB"), (999.6 * 2**20, "1000 MiB"), (2**30, "1 GiB"), (5000 * 2**40, "5000 TiB")),
    ],
)
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize("options", [{"keep": 5}, {"k": 0.2}, {"keep": 5, "merge": True}])
def test_how_much_of_the_attention_is_held(model, options):
    inputs, seen = tiny.inputs(*SAMPLES), []

    def watch(evidence):
        seen.append(evidence)
        return evidence.saliency

    with crosstrim.trim(model, policy=watch, **options) as handle, torch.no_grad():
        output = model(**inputs, use_cache=True)
        report, again = handle.report(held=True), handle.report(output.past_key_values, held=True)
        assert all(image.held is None for sample in handle.report().samples for image in sample)
    (evidence,) = seen
    size = evidence.features_per_image
    shares = 0
    for place, sample in enumerate(report.samples):
        for image in sample:
            (number,) = {index // size for index in image.kept_indices}
            drew = evidence.saliency[place, :, number * size : (number + 1) * size].sum(0)
            kept = [index % size for index in image.kept_indices]
            assert image.held == pytest.approx(float(drew[kept].sum() / drew.sum()), rel=1e-5)
            shares += 0 < image.held < 1
    assert shares
    assert again == report
    images = report.to_dict()["samples"][0]["images"]
    assert images[0]["held"] == pytest.approx(report.samples[0][0].held, abs=1e-6)


def test_where_nothing_is_dropped_all_of_it_is_held(model):
    with crosstrim.trim(model) as handle, torch.no_grad():
        model(**tiny.inputs(*SAMPLES), use_cache=True)
        assert {image.held for sample in handle.report(held=True).samples for image in sample} == {1.0}
