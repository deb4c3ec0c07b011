"""Features that speak in the language model's words, and a language model that listens before it is trained."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recipes.receipts.settings import SETTINGS
from recipes.receipts.task import task
from recipes.receipts.words import ITEMS, LETTERED, WORDS
from recipes.training import attention, vision
from recipes.training.model import build_model
from recipes.training.spoken import Speech, Spoken, turn
from recipes.training.tiles import IGNORE


@pytest.fixture(scope="module")
def lesson():
    return task(replace(SETTINGS, vision_width=64, vision_heads=1, vision_layers=2, vision_intermediate=(1,)))


@pytest.fixture(scope="module")
def model(lesson):
    return build_model(lesson)


@pytest.fixture
def say(lesson, model):
    """Features of the text's width that say a word and, turned, another."""
    table = model.model.language_model.embed_tokens.weight.detach()
    return lambda word, key: table[lesson.token(word)] + turn(table[lesson.token(key)])


def test_turning_twice_undoes_it():
    vectors = torch.randn(3, 8)
    assert torch.equal(turn(turn(vectors)), vectors)
    assert torch.equal(turn(torch.tensor([1, 2, 3, 4])), torch.tensor([3, 4, 1, 2]))


def test_a_feature_says_two_words_at_once(lesson, model, say):
    parts = SimpleNamespace(multi_modal_projector=torch.nn.Identity(), language_model=model.model.language_model)
    plain = SimpleNamespace(model=parts)
    word, entry = (Spoken(lesson, lesson.patches[name]) for name in ("word", "entry"))
    for said, key in (("12", "Bread"), ("Bread", "Bread"), ("Anna", "Name")):
        feature = say(said, key)[None]
        assert word(feature, plain).argmax(-1).item() == WORDS.index(said)
        assert entry(feature, plain).argmax(-1).item() == WORDS.index(key)
        assert (word(feature, plain).shape, entry(feature, plain).shape) == (
            (1, len(WORDS) + 1),
            (1, len(LETTERED) + 1),
        )


def test_the_heads_teach_the_eyes_and_not_the_language(lesson, model):
    heads = vision.Heads(lesson, model)
    features = torch.randn(1, 4, 101, 128, requires_grad=True)
    heads(features)["word"].sum().backward()
    assert features.grad.abs().sum() > 0
    assert model.model.multi_modal_projector.weight.grad.abs().sum() > 0
    assert model.model.language_model.embed_tokens.weight.grad is None
    assert {name.split(".")[0] for name, _ in heads.named_parameters()} == {"patches"}
    model.zero_grad(set_to_none=True)


@pytest.fixture
def shown(lesson):
    """The labels of two pages and a crowd."""
    pages = [lesson.draw("train", np.random.default_rng(seed)) for seed in (1, 2)]
    return vision.batch_of(lesson, [*pages, lesson.draw_crowd(np.random.default_rng(3), 1.0)])


def test_speech_is_the_sum_of_a_code_for_each_thing_asked(lesson, model, shown):
    speech, width = Speech(lesson, model), SETTINGS.text_width
    embeddings = model.model.language_model.embed_tokens.weight
    wanted = torch.zeros(*shown["word"].shape, width)
    for place in itertools.product(*map(range, wanted.shape[:-1])):
        for name, codes in speech.codes().items():
            label = shown[name][place].item()
            if label == IGNORE:
                continue
            words = lesson.patches[name].words
            code = embeddings[lesson.token(words[label])] if label < len(words) else None
            if code is not None:
                assert torch.equal(codes[label], turn(code) if name == "entry" else code)
            wanted[place] += codes[label]
    assert speech.loss(wanted, shown).item() == pytest.approx(0, abs=1e-9)
    assert speech.loss(torch.zeros_like(wanted), shown).item() == pytest.approx(1)


def test_every_word_counts_alike_in_speech_and_what_is_unknown_does_not(lesson, model, shown):
    speech = Speech(lesson, model)
    said = torch.zeros(*shown["word"].shape, SETTINGS.text_width, requires_grad=True)
    speech.loss(said, shown).backward()
    counted = (shown["word"] != IGNORE) & (shown["entry"] != IGNORE)
    assert not counted[2].any()  # nobody knows whose key a crowd's words are
    assert torch.equal(said.grad.abs().sum(-1) > 0, counted)
    with torch.no_grad():
        silent = torch.zeros_like(said)
        losses = []
        for word in shown["word"][counted].unique():
            one = {name: labels.clone() for name, labels in shown.items()}
            one["word"][shown["word"] != word] = IGNORE
            losses.append(speech.loss(silent + 0.1, one))
        assert speech.loss(silent + 0.1, shown).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@torch.no_grad()
def test_cross_attention_starts_by_looking_for_its_own_word(lesson, model, say):
    """A row of items with their prices: half of the heads find the item's name, half its price."""
    features = torch.stack([*(say(item, "Total") for item in ITEMS), *(say("Total", item) for item in ITEMS)])
    asked = model.model.language_model.embed_tokens.weight[[lesson.token(item) for item in ITEMS]]
    layer = model.model.language_model.layers[SETTINGS.cross_layers[0]].cross_attn
    model.config.text_config._attn_implementation = attention.NAME
    queries = layer.q_norm(layer.q_proj(asked).unflatten(-1, (SETTINGS.text_heads, -1)))
    keys = layer.k_norm(layer.k_proj(features).unflatten(-1, (SETTINGS.text_key_heads, -1)))
    keys = keys.repeat_interleave(SETTINGS.text_heads // SETTINGS.text_key_heads, dim=1)
    chances = torch.einsum("qhd,khd->hqk", queries, keys).softmax(-1)
    half, own = SETTINGS.text_heads // 2, torch.arange(len(ITEMS))
    assert chances[:half, own, own].mean() > 4 * chances[:half, own, own + len(ITEMS)].mean()
    assert chances[half:, own, own + len(ITEMS)].mean() > 4 * chances[half:, own, own].mean()


@torch.no_grad()
def test_what_is_found_can_be_said(lesson, model, say):
    """A value that cross-attention reads comes out as more likely than any other word."""
    language = model.model.language_model
    layer = language.layers[SETTINGS.cross_layers[0]].cross_attn
    for word in ("12", "Bread", "Anna"):
        value = layer.v_proj(say(word, "Total")).unflatten(0, (SETTINGS.text_key_heads, -1))
        value = value.repeat_interleave(SETTINGS.text_heads // SETTINGS.text_key_heads, 0).flatten()
        logits = model.lm_head(language.norm(layer.o_proj(value)))[[lesson.token(one) for one in WORDS]]
        assert WORDS[logits.argmax()] == word
