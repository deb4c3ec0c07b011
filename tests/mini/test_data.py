"""The recipe's data: reproducible, held out by whole images, and every answer right by construction."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from recipes.mini import digits, photos, pictures, questions
from recipes.mini.settings import PATCH, SMOKE, TILE
from recipes.mini.task import SEGMENT, WORDS, task
from recipes.training import language, vision
from recipes.training.settings import LAYOUTS, MAX_TILES
from recipes.training.task import JOINT
from recipes.training.tiles import IGNORE
from recipes.training.tokenizer import CHAT_TEMPLATE, IMAGE


def _scene(seed: int, layout: tuple[int, int] = (2, 2), split: str = "train") -> pictures.Scene:
    return pictures.scene(split, layout, np.random.default_rng(seed))


@pytest.fixture(scope="module", autouse=True)
def _each_digit_once():
    """Training distorts every digit ten times, which takes seconds that no test here needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_TRAIN_VARIANTS", 1)
        forget()
        yield
    forget()


def forget():
    """Let the stamps be drawn anew."""
    digits.stamps.cache_clear()
    digits.stamps_by_value.cache_clear()


def test_handwriting_is_split_by_image() -> None:
    parts = [set(digits.split_indices(split).tolist()) for split in digits.SPLITS]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 1797
    for part in digits.SPLITS:
        assert len({one.value for one in digits.stamps(part)}) == 10


def test_photographs_are_split_whole_and_licensed() -> None:
    names = [photo.name for photo in photos.PHOTOS]
    assert len(names) == len(set(names))
    for split in digits.SPLITS:
        assert photos.of_split(split)
    for photo in photos.PHOTOS:
        assert photo.licence in {"CC0 1.0", "CC BY 2.0", "public domain"}
        assert photo.credit
        assert photo.load().mode == "RGB"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_draws_the_same_picture(layout: tuple[int, int]) -> None:
    one, other = _scene(3, layout), _scene(3, layout)
    assert one.digits == other.digits
    assert np.array_equal(one.pixels, other.pixels)
    assert one.pixels.shape == (layout[0] * TILE, layout[1] * TILE, 3)
    assert not np.array_equal(one.pixels, _scene(4, layout).pixels)


def test_a_training_step_draws_the_same_batch_again() -> None:
    learned = task(SMOKE)
    for draw in (lambda: vision.draw(learned, 1), lambda: language.draw(learned, JOINT, 1)):
        one, other = draw(), draw()
        assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_questions_have_one_right_answer(layout: tuple[int, int]) -> None:
    for seed in range(20):
        scene = _scene(seed, layout)
        found = scene.digits
        assert pictures.FEWEST <= len(found) <= pictures.MOST
        for field in ("value", "colour", "place"):
            assert len({getattr(digit, field) for digit in found}) == len(found)
        order = [pictures.PLACES.index(digit.place) for digit in found]
        assert order == sorted(order)
        for digit, place in zip(found, order, strict=True):
            assert digit.centre[0] * 3 // (layout[1] * TILE) == place % 3
            assert digit.centre[1] * 3 // (layout[0] * TILE) == place // 3


def test_answers_follow_from_the_picture() -> None:
    rng = np.random.default_rng(5)
    for seed in range(20):
        scene = _scene(seed)
        for kind in questions.KINDS:
            asked = questions.ask(scene, kind, rng)
            assert asked.kind == kind
            if kind == "count":
                assert asked.answer == str(len(scene.digits))
            elif kind == "read":
                assert asked.answer == " ".join(str(digit.value) for digit in scene.digits)
            else:
                about, wanted = (
                    {"digit": "value", "colour": "colour", "place": "place"}[part] for part in kind.split("_to_")
                )
                digit = next(one for one in scene.digits if str(getattr(one, wanted)) == asked.answer)
                named = getattr(digit, about)
                assert (questions.where(named) if about == "place" else str(named)) in asked.text


def test_patch_labels_name_the_digit_under_them() -> None:
    scene = _scene(1, (1, 3))
    labels = pictures.patch_labels(scene)
    patches = TILE // PATCH
    assert all(label.shape == (MAX_TILES, patches**2) for label in labels.values())
    assert all((label[3] == IGNORE).all() for label in labels.values())
    for rank, digit in enumerate(scene.digits):
        (column, x), row = divmod(int(digit.centre[0]), TILE), int(digit.centre[1])
        patch = row // PATCH * patches + x // PATCH
        assert labels["digit"][column, patch] == digit.value
        assert labels["rank"][column, patch] == rank
        assert labels["place"][column, patch] == pictures.PLACES.index(digit.place)


def test_tokenizer_encodes_anything_and_back() -> None:
    tokenizer = task().tokenizer
    for text in [*questions.corpus()[::97], "Grüße, 世界! 🙂\n\t tab", ""]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(IMAGE) == WORDS + 8 == len(tokenizer) - 1
    header = tokenizer.tokenize("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert len(header) == 4


def test_packed_segments_spell_the_real_prompt() -> None:
    tokenizer = task().tokenizer
    rng = np.random.default_rng(0)
    lessons = [questions.lesson(_scene(seed), 6, rng) for seed in range(4)]
    packed = language.pack(task(), lessons)
    prefix = task().prefix
    for row, lesson in enumerate(lessons):
        for column, asked in enumerate(lesson):
            start = len(prefix) + column * SEGMENT
            inputs = packed["input_ids"][row, start : start + SEGMENT].tolist()
            targets = packed["targets"][row, start : start + SEGMENT].tolist()
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.text}]}]
            prompt = tokenizer.apply_chat_template(
                chat, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
            )
            assert tokenizer.decode(prefix + inputs).startswith(prompt + asked.answer)
            wanted = [target for target in targets if target != IGNORE]
            assert tokenizer.decode(wanted) == asked.answer + tokenizer.eos_token
