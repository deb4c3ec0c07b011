from __future__ import annotations

import base64
import os
import pickle
import shutil

import pyarrow
import pytest
from pyarrow import parquet

from crosstrim.data import sources
from crosstrim.data.questions import open_questions
from crosstrim.errors import DatasetError
from tests.support.questions import without_answers


def everything(rows):
    return rows.read(range(len(rows)))


def test_a_folder_is_read_in_order_of_names(pictures):
    (pictures / "deep").mkdir()
    (pictures / "0.png").rename(pictures / "deep" / "z.PNG")
    (pictures / "notes.txt").write_text("no picture")
    rows = everything(open_questions(pictures, "what?"))
    assert [row.id for row in rows] == ["1.png", "2.png", "3.png", "deep/z.PNG"]
    assert {row.question for row in rows} == {"what?"}
    assert rows[0].sources == (str(pictures / "1.png"),)


def test_what_a_folder_holds_beside_pictures_is_counted(pictures):
    assert open_questions(pictures, "what?").passed_over is None
    (pictures / ".DS_Store").write_bytes(b"")
    for name in ("a.heic", "b.JP2", "c.ico", "d.txt"):
        (pictures / name).write_bytes(b"?")
    rows = open_questions(pictures, "what?")
    assert len(rows) == 4
    assert "passed over 4 files that are no picture by the ending (a.heic, b.JP2, c.ico, ...); " in rows.passed_over
    assert pickle.loads(pickle.dumps(rows)).passed_over == rows.passed_over


def test_names_that_are_not_utf_8_have_ids_that_are(pictures):
    for name in (b"\xff.png", b"\xfe.png"):
        shutil.copy(pictures / "0.png", os.path.join(os.fsencode(pictures), name))
    rows = open_questions(pictures, "what?")
    assert [row.id for row in everything(rows)][-2:] == ["\\xfe.png", "\\xff.png"]
    assert everything(rows)[-1].sources == (os.fsdecode(os.fsencode(pictures) + b"/\xff.png"),)
    assert len(rows.sha256) == 64
    shutil.copy(pictures / "0.png", pictures / "\\xff.png")
    with pytest.raises(DatasetError, match=r"two pictures whose id is .*; rename one of them"):
        open_questions(pictures, "what?")


def test_jsonl_rows_can_be_read_in_any_order(questions):
    path = questions(["", *without_answers(), "  "])
    rows = open_questions(path)
    assert [row.id for row in everything(rows)] == [f"q{number}" for number in range(12)]
    assert [row.id for row in rows.read(range(7, 9))] == ["q7", "q8"]


def test_parquet_gives_the_same_rows_as_jsonl(questions, pictures):
    path = pictures / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(without_answers()), path, row_group_size=5)
    rows = open_questions(path)
    assert everything(rows) == everything(open_questions(questions()))
    assert everything(pickle.loads(pickle.dumps(rows))) == everything(rows)


def test_pictures_may_be_inside_the_file(questions, pictures):
    content = (pictures / "0.png").read_bytes()
    path = pictures / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"image": {"bytes": content, "path": None}}]), path)
    assert everything(open_questions(path, "what?"))[0].sources == (content,)
    inside = questions([{"image": {"bytes": base64.b64encode(content).decode()}}])
    assert everything(open_questions(inside, "what?"))[0].sources == (content,)


def data_uri(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def test_pictures_may_be_data_uris(questions, pictures, monkeypatch):
    content = (pictures / "0.png").read_bytes()
    rows = [
        {"image": data_uri(content)},
        {"image": data_uri(content, "image/png;name=a.png").replace("data", "DATA")},
    ]
    assert [row.sources for row in everything(open_questions(questions(rows), "what?"))] == [(content,), (content,)]
    monkeypatch.setattr(sources, "MAX_DATA_BYTES", len(content))
    assert everything(open_questions(questions(rows[:1]), "what?"))[0].error is None
    monkeypatch.setattr(sources, "MAX_DATA_BYTES", len(content) - 1)
    (row,) = everything(open_questions(questions(rows[:1]), "what?"))
    assert row.error == (
        f"the picture's file has {len(content)} bytes; the limit of a data: URI is {len(content) - 1}. Name its path."
    )


def test_a_row_may_have_several_pictures(questions, pictures):
    content = (pictures / "0.png").read_bytes()
    row = {"image": ["1.png", data_uri(content), {"bytes": base64.b64encode(content).decode()}]}
    expected = (str(pictures / "1.png"), content, content)
    assert everything(open_questions(questions([row]), "what?"))[0].sources == expected
    path = pictures / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"image": ["1.png", "2.png"]}, {"image": ["3.png"]}]), path)
    first, second = everything(open_questions(path, "what?"))
    assert first.sources == (str(pictures / "1.png"), str(pictures / "2.png"))
    assert second.sources == (str(pictures / "3.png"),)


def test_a_row_s_own_question_comes_first(questions):
    rows = everything(open_questions(questions([without_answers()[0], {"image": "0.png"}]), "otherwise?"))
    assert [row.question for row in rows] == ["what about 0?", "otherwise?"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", "the line is no JSON"),
        ("[1]", "expected an object with image, question, got a list"),
        ({"image": "0.png", "question": "  "}, "'question' must be a text that is not empty"),
        ({"image": "0.png"}, "'question' is missing; every row needs image, question."),
        ({"image": "0.png", "question": "a <|image|>?"}, "which stands for the picture"),
        ({"image": "0.png", "question": "a \ud800?"}, "half a character"),
        ({"question": "what?"}, "'image' is missing; every row needs image, question."),
        ({"image": {"bytes": "?"}, "question": "what?"}, "no base64"),
        ({"image": "data:image/png,abc", "question": "what?"}, "must begin with data:image/TYPE;base64, such as"),
        ({"image": "data:text/html;base64,aaaa", "question": "what?"}, "must begin with data:image/TYPE;base64,"),
        ({"image": "data:image/png;base64,a?", "question": "what?"}, "the data: URI holds no valid base64"),
        ({"image": [], "question": "what?"}, "'image' lists 0 pictures; a question is about 1 to 8."),
        ({"image": ["0.png"] * 9, "question": "what?"}, "'image' lists 9 pictures; a question is about 1 to 8."),
        ({"image": ["0.png", None], "question": "what?"}, "picture 2 of 2: 'image' must be a path"),
        ({"image": [["0.png"]], "question": "what?"}, "'image' must be a path, a data: URI, or"),
    ],
)
def test_a_bad_row_says_what_is_wrong_and_the_next_is_read(questions, row, words):
    bad, good = everything(open_questions(questions([row, without_answers()[3]])))
    assert words in bad.error
    assert (bad.id, good.id, good.error) == ("1", "q3", None)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", "b", "a"], r"the lines 1 and 3 both have the id 'a'"),
        (["2", None, "3"], r"the lines 1 and 2 both have the id '2' \(without one, a row has its number"),
        ([None, "1"], r"the lines 1 and 2 both have the id '1'"),
        (
            [7, "7"],
            r"the lines 1 and 2 both have the id '7'.*; give every row an id of its own, or leave all ids out\.",
        ),
        (["\ud800", "\ud801"], r"the lines 1 and 2 both have the id '\?'"),
    ],
)
def test_two_rows_of_one_id_are_refused(questions, ids, words):
    with pytest.raises(DatasetError, match=words):
        open_questions(questions([{**row, "id": one} for row, one in zip(without_answers(), ids, strict=False)]))


def test_so_are_those_of_parquet_and_of_lines_that_cannot_be_read(questions, pictures):
    with pytest.raises(DatasetError, match="the lines 1 and 3 both have the id '3'"):
        open_questions(questions([{"id": 3}, "", "{not json"]))
    rows = [{**row, "id": one} for row, one in zip(without_answers(), ["a", "3", None], strict=False)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), pictures / "rows.parquet", row_group_size=1)
    with pytest.raises(DatasetError, match="the rows 2 and 3 both have the id '3'"):
        open_questions(pictures / "rows.parquet")


def test_a_row_without_an_id_has_its_line_s_number(questions):
    rows = everything(open_questions(questions([without_answers()[0], "", {"image": "0.png", "question": "what?"}])))
    assert [row.id for row in rows] == ["q0", "3"]


def test_the_hash_changes_with_the_rows(questions, pictures):
    before = open_questions(questions()).sha256
    assert open_questions(questions(without_answers(11))).sha256 != before
    folder = open_questions(pictures, "what?").sha256
    (pictures / "0.png").unlink()
    assert open_questions(pictures, "what?").sha256 != folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing.jsonl", "cannot be read"),
        ("nothing.parquet", "cannot be read as Parquet"),
        ("nothing", "there is no file or folder .*nothing; check the path"),
        ("0.png", "ends in '.png'; questions are read from .jsonl and .parquet files, and from folders"),
        (".", "say with --question"),
    ],
)
def test_what_is_no_input_is_refused(pictures, name, words):
    with pytest.raises(DatasetError, match=words):
        open_questions(pictures / name)


def test_an_input_without_rows_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DatasetError, match="holds no row"):
        open_questions(tmp_path / "empty.jsonl")
    with pytest.raises(DatasetError, match="none holds no picture"):
        open_questions(_empty(tmp_path), "what?")


def _empty(folder):
    (folder / "none").mkdir()
    return folder / "none"
