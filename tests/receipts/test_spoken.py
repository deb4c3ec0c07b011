"""Features that speak in the language model's words, and a language model that listens before it is trained."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipes.receipts.settings import SETTINGS
from recipes.receipts.task import task
from recipes.receipts.words import ITEMS, WORDS
from recipes.training import language, vision
from recipes.training.model import build_model
from recipes.training.settings import smoke
from recipes.training.spoken import Speech, turn
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


@pytest.fixture
def shown(lesson):
    """The labels of two pages and a crowd."""
    pages = [lesson.draw("train", np.random.default_rng(seed)) for seed in (1, 2)]
    return vision.batch_of(lesson, [*pages, lesson.draw_crowd(np.random.default_rng(3), 1.0)])


@pytest.fixture
def speech(lesson):
    """The speech of a model whose projector passes on what it is given."""
    model = build_model(lesson)
    model.model.multi_modal_projector = torch.nn.Identity()
    return Speech(lesson, model)


def test_turning_twice_undoes_it():
    vectors = torch.randn(3, 8)
    assert torch.equal(turn(turn(vectors)), vectors)
    assert torch.equal(turn(torch.tensor([1, 2, 3, 4])), torch.tensor([3, 4, 1, 2]))


def with_class(said):
    """Patches as vision features: each tile has a class feature before them."""
    return torch.nn.functional.pad(said, (0, 0, 1, 0))


def test_speech_is_the_sum_of_a_code_for_each_thing_asked(lesson, model, speech, shown):
    embeddings = model.model.language_model.embed_tokens.weight
    wanted = torch.zeros(*shown["word"].shape, SETTINGS.text_width)
    for place in itertools.product(*map(range, wanted.shape[:-1])):
        for name, codes in speech.codes().items():
            label, words = shown[name][place].item(), lesson.patches[name].words
            if label == IGNORE:
                continue
            if label < len(words):
                code = embeddings[lesson.token(words[label])]
                assert torch.equal(codes[label], turn(code) if name == "entry" else code)
            wanted[place] += codes[label]
    assert speech.loss(with_class(wanted), shown).item() == pytest.approx(0, abs=1e-9)
    assert speech.loss(with_class(torch.zeros_like(wanted)), shown).item() == pytest.approx(1)


def test_every_word_counts_alike_in_speech_and_what_is_unknown_does_not(speech, shown):
    said = torch.zeros(*shown["word"].shape, SETTINGS.text_width, requires_grad=True)
    speech.loss(with_class(said), shown).backward()
    counted = (shown["word"] != IGNORE) & (shown["entry"] != IGNORE)
    assert not counted[2].any()  # nobody knows whose key a crowd's words are
    assert torch.equal(said.grad.abs().sum(-1) > 0, counted)
    crowd = {name: labels[2:] for name, labels in shown.items()}
    assert speech.loss(with_class(said.detach()[2:]), crowd).item() == 0
    losses = []
    for word in shown["word"][counted].unique():
        alone = shown["word"].where(shown["word"] == word, torch.tensor(IGNORE))
        losses.append(speech.loss(with_class(said.detach() + 0.1), {**shown, "word": alone}))
    together = speech.loss(with_class(said.detach() + 0.1), shown)
    assert together.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_speech_teaches_the_eyes_and_not_the_language(lesson, shown):
    model = build_model(lesson)
    heads = vision.Heads(lesson, model)
    torch.nn.init.normal_(model.model.multi_modal_projector.weight)
    features = torch.randn(3, 4, 101, 128, requires_grad=True)
    total, figures = vision.loss_of(lesson, heads, features, shown)
    total.backward()
    assert set(figures) == {*lesson.patches, "missed"}
    assert model.model.multi_modal_projector.weight.grad.abs().sum() > 0
    assert model.model.language_model.embed_tokens.weight.grad is None
    assert {name.split(".")[0] for name, _ in heads.named_parameters()} == {"patches"}
    assert not any(name.startswith("speech") for name in heads.state_dict())


@torch.no_grad()
def test_cross_attention_starts_by_looking_for_its_own_word(lesson, model, say):
    """A row of items with their prices: half of the heads find the item's name, half its price."""
    features = torch.stack([*(say(item, "Total") for item in ITEMS), *(say("Total", item) for item in ITEMS)])
    asked = model.model.language_model.embed_tokens.weight[[lesson.token(item) for item in ITEMS]]
    layer = model.model.language_model.layers[SETTINGS.cross_layers[0]].cross_attn
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


def test_an_untrained_projector_says_nothing_and_learns_only_with_the_eyes(lesson, tmp_path):
    lesson = replace(lesson, settings=smoke(lesson.settings))
    model = build_model(lesson)
    projector = model.model.multi_modal_projector
    assert not projector.weight.any()
    torch.nn.init.ones_(projector.weight)  # as if it had learned to speak
    language.train(model, lesson, tmp_path)
    assert (projector.weight == 1).all()
    assert not projector.weight.requires_grad
