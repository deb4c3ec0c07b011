"""The second task's data: reproducible, held out by typeface, and every answer and label right by construction."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("font_roboto")

from recipes.receipts import __main__ as program
from recipes.receipts import fonts, pages, questions
from recipes.receipts.heldout import write_benchmark
from recipes.receipts.settings import PATCH, SETTINGS, TILE
from recipes.receipts.task import draw_page, task
from recipes.receipts.words import INDEX, WORDS
from recipes.training import language, vision
from recipes.training.settings import MAX_TILES
from recipes.training.task import JOINT

import crosstrim
from crosstrim.asking.answering import ask
from crosstrim.data import dataset

SHAPES = [(kind, layout) for kind, layouts in pages.LAYOUTS.items() for layout in layouts]


def drawn(seed: int, kind: str = "receipt", split: str = "train") -> pages.Page:
    return pages.page(split, kind, pages.LAYOUTS[kind][0], np.random.default_rng(seed))


def test_typefaces_are_split_whole_and_licensed():
    names = [face.name for face in fonts.FACES]
    assert len(names) == len(set(names))
    for face in fonts.FACES:
        assert face.licence in {"Apache 2.0", "SIL OFL 1.1", "Bitstream Vera licence"}
        assert face.credit
        assert all(path.is_file() for path in face.paths())
    for split in ("train", "validation", "test"):
        assert fonts.of_split(split)


@pytest.mark.parametrize(("kind", "layout"), SHAPES)
def test_the_same_seed_draws_the_same_page(kind, layout):
    one, other = (pages.page("train", kind, layout, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(one.pixels, other.pixels)
    assert (one.lines, one.entries, one.pieces) == (other.lines, other.entries, other.pieces)
    assert one.pixels.shape == (layout[0] * TILE, layout[1] * TILE, 3)
    assert layout[0] * layout[1] == MAX_TILES


@pytest.mark.parametrize(("kind", "layout"), SHAPES)
def test_words_lie_where_they_are_said_to(kind, layout):
    for seed in range(10):
        page = pages.page("test", kind, layout, np.random.default_rng(seed))
        grey = page.pixels.mean(-1)
        height, width = grey.shape
        for piece in page.pieces:
            assert 0 <= piece.left < piece.right <= width
            assert 0 <= piece.top < piece.bottom <= height
            box = grey[round(piece.top) : round(piece.bottom), round(piece.left) : round(piece.right)]
            assert box.min() < 0.75 * np.median(grey)  # there is ink
        for line, other in zip(page.pieces, page.pieces[1:], strict=False):
            assert line.line < other.line or line.right <= other.left


@pytest.mark.parametrize(("kind", "layout"), SHAPES)
def test_patch_labels_name_the_word_under_them(kind, layout):
    page = pages.page("train", kind, layout, np.random.default_rng(5))
    labels, patches = pages.patch_labels(page), TILE // PATCH
    assert all(label.shape == (MAX_TILES, patches**2) for label in labels.values())
    for place, piece in enumerate(page.pieces):
        follow = sum(other.line == piece.line for other in page.pieces[place + 1 :])
        x, y = (piece.left + piece.right) / 2, (piece.top + piece.bottom) / 2
        (row, y), (column, x) = divmod(int(y // PATCH), patches), divmod(int(x // PATCH), patches)
        said = {name: label[row * layout[1] + column, y * patches + x] for name, label in labels.items()}
        assert (said["line"], said["follow"]) == (piece.line, min(follow, 5))
        if piece.word in INDEX:
            assert said["word"] == INDEX[piece.word]
        if piece.word.isdigit():
            tens = "" if said["tens"] == pages.NO_TENS else str(said["tens"])
            assert f"{tens}{said['ones']}" == piece.word
        else:
            assert said["tens"] == said["ones"] == pages.IGNORE
        assert said["entry"] == (INDEX[piece.key] if piece.key else pages.NO_KEY)


def test_crowds_teach_every_word():
    seen, numbers = set(), set()
    for seed in range(120):
        page = pages.crowd("train", (2, 2), np.random.default_rng(seed))
        labels = pages.patch_labels(page)
        seen |= set(labels["word"].flatten().tolist())
        numbers |= set(zip(labels["tens"].flatten().tolist(), labels["ones"].flatten().tolist(), strict=True))
        assert (labels["entry"] == pages.IGNORE).all()
    assert set(range(len(INDEX) + 1)) <= seen
    assert {(tens, ones) for tens in (*range(1, 10), pages.NO_TENS) for ones in range(10)} <= numbers


def test_telling_says_entries_and_numbers_at_once_after_their_keys():
    rng, seen = np.random.default_rng(0), set()
    for seed in range(80):
        page = draw_page("train", np.random.default_rng(seed))
        values = {one.key: " ".join(filter(None, (one.quantity, one.value))) for one in page.entries}
        reverse = {one.key: " ".join(filter(None, (one.value, one.quantity))) for one in page.entries}
        ways = {
            "key": {f"{key}{'' if value[0].isdigit() else ' '}{value}" for key, value in values.items()},
            "value": {f"{value} {key}" for key, value in reverse.items()},
        }
        told = questions.tell(page, rng)
        parts = told.answer.split(", ")
        way = next(name for name, possible in ways.items() if set(parts) <= possible)
        assert len(set(parts)) == len(parts) == (2 if page.kind == "letter" else 3)
        seen.add((page.kind, way))
    assert len(seen) == 2 * len(pages.KINDS)


def test_questions_have_one_right_answer():
    rng = np.random.default_rng(0)
    asked = set()
    for seed in range(120):
        page = draw_page("train", np.random.default_rng(seed))
        listed = {entry.key: entry for entry in questions.items(page)}
        for kind in questions.KINDS:
            question = questions.ask(page, kind, rng)
            if question is None:
                assert not listed or kind == "quantity"
                continue
            asked.add((page.kind, kind))
            named = [key for key in listed if key in question.text]
            if kind == "by_key":
                assert question.answer in {entry.value for entry in page.entries}
            elif kind == "copy":
                place = next(number for number, word in enumerate(questions.ORDINALS) if word in question.text)
                assert question.answer == page.lines[place]
            elif kind == "by_value":
                assert listed[question.answer].value in question.text
                assert len({entry.value for entry in listed.values()}) == len(listed)
            elif kind == "by_place":
                place = next(number for number, word in enumerate(questions.ORDINALS) if word in question.text)
                assert question.answer == list(listed)[place]
            elif kind == "quantity":
                assert any(listed[key].quantity == question.answer for key in named)
            elif kind == "yes_no":
                assert question.answer == ("yes" if named else "no")
            elif kind == "compare":
                assert float(listed[question.answer].value) == max(float(listed[key].value) for key in named)
            else:
                assert question.answer == str(len(listed))
    assert {kind for _, kind in asked} == set(questions.KINDS)
    assert {page for page, _ in asked} == set(pages.KINDS)


def test_every_word_is_one_token_and_every_lesson_fits():
    learned = task()
    for word in WORDS:
        if not word.isdigit():
            assert len(learned.tokenizer.tokenize(word)) == len(learned.tokenizer.tokenize(f" {word}")) == 1
        assert learned.tokenizer.tokenize(word) == [word]
    for step in range(20):
        language.draw(learned, JOINT, step)


def test_a_training_step_draws_the_same_batch_again():
    learned = task()
    for draw in (lambda: vision.draw(learned, 2000), lambda: language.draw(learned, JOINT, 1)):
        one, other = draw(), draw()
        assert all(bool((one[name] == other[name]).all()) for name in one)
        assert one["tiles"].shape[1:] == (MAX_TILES, TILE, TILE, 3)
    assert ((TILE // PATCH) ** 2 + 1) % 8, "transformers would mask every patch"
    assert (TILE // PATCH) ** 2 >= 100
    assert SETTINGS.text_heads == 4 * SETTINGS.text_key_heads


def test_the_benchmark_is_read_by_the_reader_of_question_files(tmp_path):
    path = write_benchmark(tmp_path, "test", count=8)
    read = dataset.read(path)
    assert not read.problems
    assert len(read.items) == len(path.read_text().splitlines()) > 8


def test_blind_questions_are_the_same_about_another_page_that_looks_alike(tmp_path):
    path = write_benchmark(tmp_path, "test", count=24)
    asked, blind = (dataset.read(tmp_path / f"{name}.jsonl").items for name in ("questions", "blind"))
    own_of = {item.id: item for item in asked}
    assert path.name == "questions.jsonl"
    assert len(blind) == len(asked)
    for item in blind:
        own = own_of[item.id]
        assert (item.question, item.answers) == (own.question, own.answers)
        assert item.open().size == own.open().size
        assert item.picture != own.picture


@pytest.mark.slow
def test_a_tiny_run_makes_a_checkpoint_that_answers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["receipts", "--smoke", "--work", str(tmp_path)])
    monkeypatch.setattr(program, "write_benchmark", lambda folder, split: write_benchmark(folder, split, count=4))
    program.main()
    model, processor = crosstrim.load(str(tmp_path / "checkpoint"))
    page = Image.open(tmp_path / "test" / "images" / "000.jpg")
    answer = ask(model, processor, page, "What is the total?", crosstrim.TrimConfig(keep=0.1), max_new_tokens=2)
    ((image,),) = answer.report.samples
    assert image.kept < image.visible == 4 * 101
