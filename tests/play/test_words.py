"""What the page says, without a page."""

from __future__ import annotations

import pytest
import torch

from crosstrim import TrimConfig
from crosstrim.asking.answering import Answer
from crosstrim.errors import InputError
from crosstrim.method.names import POLICIES
from crosstrim.play import words
from crosstrim.play.state import Comparison, Point, config_of
from crosstrim.trimming.report import ImageReport, TrimReport


def compared(trimmed: str, untrimmed: str) -> Comparison:
    image = ImageReport(features=20, visible=10, kept=4, kept_indices=(0, 1, 2, 3), layers=(4, 4))
    config = TrimConfig(keep=0.4)
    report = TrimReport(((image,),), 4 * 1024, 20 * 1024, config, versions={}, compat={})
    return Comparison(Answer(trimmed, 3, 0.125, report), Answer(untrimmed, 1, 2.0))


def test_a_comparison_has_all_numbers():
    said = words.comparison(compared("red", "blue"), "kept 4 of 9 patches")
    for part in ("4 of 10", "40.0 %", "4 KiB", "of 20 KiB untrimmed", "0.12 s, 3 tokens", "untrimmed 2.00 s"):
        assert part in said
    assert "Kept 4 of 9 patches." in said
    assert "policy contribution" in said
    assert words.CHANGED in said
    assert words.SAME in words.comparison(compared("red", "red"), "")


def test_nothing_that_was_said_becomes_html():
    wild = '<img src=x onerror="alert(1)">'
    for said in (
        words.comparison(compared(wild, wild), wild),
        words.table([Point(5, compared(wild, wild))]),
        words.notice(wild),
        words.heading(wild),
    ):
        assert "<img" not in said
        assert "&lt;img" in said


def test_an_empty_answer_is_told():
    assert "(nothing)" in words.comparison(compared("", "red"), "")


def test_a_table_has_a_row_for_each_budget():
    said = words.table([Point(1, compared("red", "red")), Point(5, compared("blue", "red"))])
    assert said.count("<tr class=") == 2
    assert "<td>same</td>" in said
    assert "<td>changed</td>" in said
    assert words.table([]) == ""


def test_every_policy_can_be_chosen_and_is_what_its_name_says():
    names = [name for _, name in words.POLICY_CHOICES]
    assert sorted(names) == ["", *sorted(POLICIES)]
    for _, knob in words.KNOB_CHOICES:
        for name in names:
            assert config_of(knob, 10, name or None).policy == (name or None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("the picture\nis none."), "The picture is none."),
        (torch.OutOfMemoryError("CUDA out of memory"), "The device ran out of memory"),
        (KeyError("secret"), "Something went wrong; the terminal"),
    ],
)
def test_errors_are_sentences(error, said, capsys):
    assert words.sentence(error).startswith(said)
    assert ("secret" in capsys.readouterr().err) == isinstance(error, KeyError)
