"""The analysis of a model, against loops over the attention weights that transformers itself returns."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosstrim.asking import answering
from crosstrim.data import dataset
from crosstrim.eval import analysis, kv_table, watch
from crosstrim.memory import SHAPES
from crosstrim.models import mllama
from tests.support import oracle, tiny
from tests.support.questions import with_answers, write_pictures, write_rows
from tests.support.statistics import pearson, ranks, top

LAYERS = list(tiny.CROSS_LAYERS)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write_pictures(folder)
    return dataset.read(write_rows(folder, with_answers()))


@pytest.fixture(scope="module")
def result(loaded, questions):
    return analysis.run(*loaded, questions, name="tiny", batch_size=5)


@pytest.fixture(scope="module")
def weights(loaded, questions):
    """Per question, read alone, per layer: [Hq][m] lists, the attention summed over the rows from the image on."""
    model, processor = loaded
    model.set_attn_implementation("eager")
    try:
        return [attention(model, processor, item) for item in questions.items]
    finally:
        model.set_attn_implementation("sdpa")


def attention(model, processor, item):
    inputs = answering.encode(processor, [item.open()], [item.question])
    with torch.no_grad():
        maps = model(**inputs, use_cache=False, output_attentions=True).attentions
    image_row = inputs["input_ids"][0].tolist().index(model.config.image_token_index)
    tiles = int(inputs["cross_attention_mask"][0, -1].sum())
    visible = tiles * tiny.FEATURES_PER_TILE
    return [maps[layer][0, :, image_row:, :visible].double().sum(1).tolist() for layer in LAYERS]


def together(heads):
    return [sum(column) / len(heads) for column in zip(*heads, strict=True)]


def fewest(scores, mass):
    held, ordered = 0.0, sorted(scores, reverse=True)
    for count, one in enumerate(ordered, 1):
        held += one
        if held >= mass * sum(scores) * (1 - 1e-9):
            return count / len(scores)
    raise AssertionError


def union(heads, k):
    scores = torch.tensor([heads])
    kept = oracle.kept_by_loops(scores, torch.ones(1, scores.shape[-1], dtype=torch.bool), k=k)
    return set(kept[0].nonzero().flatten().tolist())


def near(values):
    """The mean over questions; attention in another order may move a threshold by a feature now and then."""
    return pytest.approx(mean(values), abs=2e-3)


def test_sparsity(result, weights):
    assert result["layers"] == LAYERS
    assert result["visible_features"] == pytest.approx(mean(len(one[0][0]) for one in weights))
    for place, layer in enumerate(result["sparsity"]):
        assert layer["layer"] == LAYERS[place]
        for mass in analysis.MASSES:
            expected = [fewest(together(one[place]), mass) for one in weights]
            assert layer["together"][str(mass)] == near(expected)
            for head, found in enumerate(layer["heads"][str(mass)]):
                assert found == near([fewest(one[place][head], mass) for one in weights])


def test_agreement(result, weights):
    means = [[together(heads) for heads in one] for one in weights]
    for a in range(len(LAYERS)):
        for b in range(len(LAYERS)):
            correlations = [pearson(*[list(map(float, ranks(one[layer]))) for layer in (a, b)]) for one in means]
            assert result["agreement"]["rank_correlation"][a][b] == near(correlations)
            for share in analysis.TOPS:
                overlaps = []
                for one in means:
                    count = math.ceil(Fraction(str(share)) * len(one[0]))
                    overlaps.append(len(top(one[a], count) & top(one[b], count)) / count)
                assert result["agreement"]["overlap"][str(share)][a][b] == near(overlaps)
    for share in analysis.TOPS:
        counts = [math.ceil(Fraction(str(share)) * len(one[0])) / len(one[0]) for one in means]
        assert result["agreement"]["chance"][str(share)] == near(counts)


def test_what_the_first_layer_holds(result, weights):
    assert [one["k"] for one in result["first_layer"]] == list(analysis.KS)
    for setting in result["first_layer"]:
        unions = [union(one[0], setting["k"]) for one in weights]
        sizes = [len(kept) / len(one[0][0]) for kept, one in zip(unions, weights, strict=True)]
        assert setting["kept"] == near(sizes)
        for place, later in enumerate(setting["later"], 1):
            scores = [together(one[place]) for one in weights]
            held = [sum(row[n] for n in kept) / sum(row) for row, kept in zip(scores, unions, strict=True)]
            most = [
                sum(sorted(row, reverse=True)[: len(kept)]) / sum(row)
                for row, kept in zip(scores, unions, strict=True)
            ]
            assert later["layer"] == LAYERS[place]
            assert later["held"] == near(held)
            assert later["most"] == near(most)


def test_the_random_model_tells_right_from_wrong(result):
    """What the numbers above compare differs from layer to layer, so that a mix-up would show."""
    overlap = result["agreement"]["overlap"]["0.25"]
    assert len({overlap[0][1], overlap[0][2], overlap[1][2], 1.0}) == 4
    assert len({str(layer["heads"]) for layer in result["sparsity"]}) == len(LAYERS)


@pytest.mark.parametrize("batch_size", [1, 12])
def test_batch_mates_change_nothing(loaded, questions, result, batch_size):
    found = analysis.run(*loaded, questions, name="tiny", batch_size=batch_size)
    backwards = replace(questions, items=questions.items[::-1])
    reordered = analysis.run(*loaded, backwards, name="tiny", batch_size=batch_size)
    for other in (found, reordered):
        for part in ("sparsity", "agreement", "first_layer"):
            assert flat(other[part]) == pytest.approx(flat(result[part]), abs=1e-5)


def flat(value):
    if isinstance(value, dict):
        return [number for one in value.values() for number in flat(one)]
    return [number for one in value for number in flat(one)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_on_either_side_neither_rates_nor_is_seen(pad):
    model = tiny.build()
    located = mllama.locate(model)
    samples, seeds = [[2, tiny.Image(1), 3], [5, tiny.Image(2, seed=1), 9], [4, tiny.Image(4, seed=2), 1]], [0, 1, 2]
    inputs = tiny.inputs(*samples, seeds=seeds, pad=pad)
    padding = inputs["attention_mask"] == 0
    inputs["cross_attention_mask"][padding] = 1  # whatever padding could see must not count
    batch = watch.run(located, located.cross_layers, inputs)
    assert len(batch.scores) == len(LAYERS)
    for number, (sample, seed) in enumerate(zip(samples, seeds, strict=True)):
        alone = watch.run(located, located.cross_layers, tiny.inputs(sample, seeds=[seed]))
        assert batch.visible[number].tolist() == alone.visible[0].tolist()
        assert int(batch.visible[number].sum()) == sample[1].tiles * tiny.FEATURES_PER_TILE
        for found, expected in zip(batch.scores, alone.scores, strict=True):
            torch.testing.assert_close(found[number], expected[0], atol=1e-5, rtol=1e-4)
            rows = 1 + sample[2]  # the image's own token rates as well
            torch.testing.assert_close(found[number].sum(-1), torch.full((8,), float(rows)), atol=1e-4, rtol=0)


def test_nothing_stays_on_the_model_even_when_it_fails():
    model = tiny.build()
    located = mllama.locate(model)
    inputs = tiny.inputs([2, tiny.Image(1), 3])
    with pytest.raises(ValueError, match="input_ids"):
        watch.run(located, located.cross_layers, {**inputs, "input_ids": None})
    watch.run(located, located.cross_layers, inputs)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 25), st.integers(0, 1000))
def test_shares_are_shares(layers, heads, features, seed):
    scores = torch.rand(layers, heads, features, generator=torch.Generator().manual_seed(seed)) + 1e-3
    found = analysis.measure(scores)
    assert found["visible"] == features
    assert bool((found["held"] <= found["most"] + 1e-9).all())
    assert all(bool(((one >= -1) & (one <= 1 + 1e-9)).all()) for key, one in found.items() if key != "visible")
    assert bool((found["kept"].diff() >= 0).all())
    assert found["held"].shape == (len(analysis.KS), layers)


def test_the_result_says_what_it_depends_on(result, questions, loaded):
    assert result["dataset"]["sha256"] == questions.sha256
    assert result["model"]["name"] == "tiny"
    assert set(result["versions"]) == {"crosstrim", "transformers", "torch", "python", "device"}
    assert result["compat"]
    assert all(result["compat"].values())
    assert result["config"] == {
        "masses": [0.5, 0.9, 0.99],
        "tops": [0.25, 0.1, 0.05],
        "ks": [0.05, 0.1, 0.25],
        "batch_size": 5,
    }
    assert result["memory"]["shape"]["bytes_per_element"] == 4
    assert result["memory"]["shape"]["parameters"] == sum(one.numel() for one in loaded[0].parameters())


@pytest.mark.parametrize(("name", "image_mib", "token_kib"), [("11b", 200, 128), ("90b", 500, 320)])
def test_kv_bytes_of_the_published_shapes(name, image_mib, token_kib):
    found = kv_table.compute(SHAPES[name])
    assert found["features"] == {
        "untrimmed": 6404,
        "one tile, padding gone": 1601,
        "keep=0.5": 3202,
        "keep=0.25": 1601,
    }
    assert [(row["batch"], row["text_tokens"]) for row in found["rows"]] == [
        (batch, tokens) for batch in (1, 8, 32, 128) for tokens in (128, 1024, 8192)
    ]
    for row in found["rows"]:
        text = row["batch"] * row["text_tokens"] * token_kib * 1024
        assert row["text_bytes"] == text
        shares = {"untrimmed": 1, "one tile, padding gone": 1 / 4, "keep=0.5": 1 / 2, "keep=0.25": 1 / 4}
        for tier, share in shares.items():
            image = row["batch"] * image_mib * 2**20 * share * 6404 / 6400  # 200 and 500 MiB are rounded
            assert row["image_bytes"][tier] == image
            assert row["ratio"][tier] == pytest.approx(image / text, abs=1e-4)
