"""Files of questions: what is read from them, and what is said of every row that cannot be asked."""

from __future__ import annotations

import base64
import builtins
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosstrim import mini
from crosstrim.data import dataset
from crosstrim.errors import DatasetError, MissingExtraError

GOOD = {"id": "a", "image": "0.png", "question": "how many?", "answers": ["4", "four"], "kind": "count"}


def problems(write, *rows):
    """What is said of the rows, and on which line."""
    return [(one.row, one.words) for one in dataset.read(write(rows)).problems]


def test_rows_become_items(write, rows):
    found = dataset.read(write(rows))
    assert found.problems == ()
    assert found.kinds == {"count": 4, "read": 4, "where": 4}
    assert [item.id for item in found.items] == [row["id"] for row in rows]
    assert found.items[3].open().size == (56, 28)
    assert found.items[3].answers == ("?",)


def test_questions_about_one_picture_stand_together(write, rows):
    mixed = rows[::3] + rows[1::3] + rows[2::3]
    found = dataset.read(write(mixed))
    pictures = [item.picture for item in found.items]
    assert len(set(pictures)) == 4
    assert sum(one != other for one, other in itertools.pairwise(pictures)) == 3
    assert {item.id for item in found.items} == {row["id"] for row in rows}


def test_id_kind_and_list_may_be_left_out(write):
    row = {"image": "0.png", "question": "how many?", "answers": "4", "source": "ignored"}
    first, second = dataset.read(write([row, "", row])).items
    assert (first.id, second.id) == ("1", "3")
    assert first.kind == dataset.ALL
    assert first.answers == ("4",)


def test_the_hash_follows_questions_answers_and_pictures(write, rows, tmp_path):
    first = dataset.read(write(rows)).sha256
    assert dataset.read(write(rows)).sha256 == first
    rows[0]["answers"] = ["5"]
    second = dataset.read(write(rows)).sha256
    (tmp_path / "0.png").write_bytes((tmp_path / "2.png").read_bytes())
    assert len({first, second, dataset.read(write(rows)).sha256}) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": "no.png"}, "there is no picture {folder}/no.png; check the path."),
        ({"image": "broken.png"}, "{folder}/broken.png is no picture that crosstrim reads"),
        ({"image": "https://example.com/a.png"}, "is a web address, which crosstrim does not open"),
        ({"image": "-"}, "there is no picture {folder}/-; check the path."),
        ({"image": ""}, "'image' must be a path"),
        ({"image": "a\0b"}, "'image' must be a path"),
        ({"question": " "}, "'question' must be a text that is not empty, got ' '."),
        ({"question": "a \ud800?"}, "the question holds half a character"),
        ({"image": ["0.png", "1.png"]}, "'image' lists 2 pictures; here a question is about one."),
        ({"question": "<|image|>?"}, "the question contains <|image|>, which stands for the picture."),
        ({"kind": ""}, "'kind' must be a text that is not empty, got ''."),
        ({"answers": []}, "an answer is empty: []; every question needs at least one"),
        ({"answers": ["4", ""]}, "an answer is empty: ['4', '']"),
        ({"answers": [4]}, "'answers' must be a text or a list of texts, got [4]."),
        ({"answers": None}, "'answers' is missing; every row needs image, question, answers."),
        ({"answers": "4"}, "'answers' is a text, but a list in line 1; rows must be alike."),
        ({"kind": None}, "'kind' is missing, but a text in line 1; rows must be alike."),
        ({"id": 7}, "'id' is a number, but a text in line 1; rows must be alike."),
        ({"id": "a"}, "id 'a' is that of line 1 already."),
    ],
)
def test_a_bad_row_is_told_by_its_line(write, tmp_path, change, words):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    ((line, said),) = problems(write, GOOD, {**GOOD, "id": "b", **change}, {**GOOD, "id": "c"})
    assert line == 2
    assert words.format(folder=tmp_path) in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": ', "the line is no JSON: "),
        ("[1]", "expected an object with image, question, answers, got a list."),
        ("null", "expected an object with image, question, answers, got nothing."),
        ("[" * 100_000, "the line is no JSON: "),
    ],
)
def test_a_line_that_is_no_row(write, line, words):
    ((number, said),) = problems(write, GOOD, "", line)
    assert number == 3
    assert said.startswith(words)


def test_a_line_in_another_encoding(write):
    path = write([GOOD])
    path.write_bytes(path.read_bytes() + '{"question": "où?"}'.encode("latin-1"))
    (problem,) = dataset.read(path).problems
    assert (problem.row, problem.words) == (2, "the line is not UTF-8.")


def test_a_picture_that_fails_is_told_for_each_of_its_rows(write):
    rows = [{**GOOD, "id": name, "image": "no.png"} for name in "xy"]
    assert [line for line, _ in problems(write, *rows)] == [1, 2]


def test_a_picture_may_come_as_bytes(write, tmp_path):
    content = base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
    rows = [
        {**GOOD, "id": name, "image": image}
        for name, image in {"a": {"bytes": content}, "b": {"path": "0.png"}}.items()
    ]
    found = dataset.read(write(rows))
    assert found.problems == ()
    assert len({item.picture for item in found.items}) == 1
    assert found.items[0].open().size == (28, 28)
    ((line, said),) = problems(write, {**GOOD, "image": {"bytes": "?"}})
    assert (line, said) == (1, "the picture's bytes are no base64.")


@pytest.mark.parametrize("on_error", dataset.ON_ERROR)
def test_stopping_and_skipping(write, rows, on_error):
    found = dataset.read(write([{**rows[0], "image": "no.png"}, *rows[1:], "?"]))
    assert found.complaints()[0].startswith(f"{found.name}, line 1: there is no picture ")
    if on_error == "skip":
        assert [item.id for item in found.usable("skip").items] == [row["id"] for row in rows[1:]]
    else:
        with pytest.raises(DatasetError, match=r"2 of 13 rows of .* cannot be asked \(line 1, 13\); repair them, or"):
            found.usable("stop")


@pytest.mark.parametrize("content", ["", "\n\n", "?"])
def test_nothing_to_ask(write, content):
    with pytest.raises(DatasetError, match="holds no question that can be asked"):
        dataset.read(write([content])).usable("skip")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no.jsonl", "no.jsonl cannot be read: No such file"),
        ("a.csv", "a.csv ends in '.csv'; questions are"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, words):
    with pytest.raises(DatasetError, match=words):
        dataset.read(tmp_path / name)


@pytest.mark.parametrize("form", ["path", "bytes", "object"])
def test_parquet(write, rows, tmp_path, form):
    expected = dataset.read(write(rows))
    content = {row["image"]: (tmp_path / row["image"]).read_bytes() for row in rows}
    forms = {
        "path": lambda name: name,
        "bytes": content.get,
        "object": lambda name: {"bytes": content[name], "path": None},
    }
    pq.write_table(
        pa.Table.from_pylist([{**row, "image": forms[form](row["image"])} for row in rows]), tmp_path / "a.parquet"
    )
    found = dataset.read(tmp_path / "a.parquet")
    assert found.problems == ()
    assert found.sha256 == expected.sha256


def test_parquet_rows_are_counted(write, rows, tmp_path):
    rows[9]["question"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(rows)
    found = dataset.read(tmp_path / "a.parquet")
    (complaint,) = found.complaints()
    assert complaint.endswith("a.parquet, row 10: 'question' is missing; every row needs image, question, answers.")


def test_parquet_without_a_column(tmp_path):
    pq.write_table(pa.table({"image": ["0.png"], "text": ["?"]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="has no column 'question', only image, text; needed are image, question"):
        dataset.read(tmp_path / "a.parquet")


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(DatasetError, match="cannot be read as Parquet"):
        dataset.read(tmp_path / "a.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    real = builtins.__import__
    missing = lambda name, *rest: (_ for _ in ()).throw(ImportError) if name == "pyarrow" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'crosstrim\[eval\]'"):
        dataset.read(tmp_path / "a.parquet")


def test_a_few_of_each_kind(write, rows):
    assert dataset.read(write(rows)).first_of_each_kind(2).kinds == {"count": 2, "read": 2, "where": 2}


def test_the_embedded_questions(write, rows, tmp_path, monkeypatch):
    path = write(rows)
    shipped = [
        {**row, "image": str(tmp_path / row["image"]), "layout": "1x1"} for row in map(json.loads, path.open())
    ]
    monkeypatch.setattr(mini, "heldout", lambda: shipped)
    monkeypatch.setattr(mini, "QUICK", 1)
    assert dataset.embedded().sha256 == dataset.read(path).sha256
    assert dataset.embedded(quick=True).kinds == {"count": 1, "read": 1, "where": 1}


def test_a_picture_may_be_a_data_uri_or_the_only_one_of_a_list(write, tmp_path):
    uri = "data:image/png;base64," + base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
    rows = [{**GOOD, "id": str(number), "image": image} for number, image in enumerate(["0.png", uri, ["0.png"]])]
    found = dataset.read(write(rows))
    assert found.problems == ()
    assert len({item.picture for item in found.items}) == 1


def test_answers_may_be_missing_where_nobody_needs_them(write):
    row = {"image": "0.png", "question": "how many?"}
    (item,) = dataset.read(write([row]), labelled=False).items
    assert (item.answers, item.kind) == ((), dataset.ALL)
    (item,) = dataset.read(write([{**row, "answers": "4"}]), labelled=False).items
    assert item.answers == ("4",)
    found = dataset.read(write([{**row, "answers": "4"}, row]), labelled=False)
    assert found.problems[0].words == "'answers' is missing, but a text in line 1; rows must be alike."


def test_a_folder_of_pictures_and_one_question(write, tmp_path):
    write([])
    found = dataset.read(tmp_path, "what?", labelled=False)
    assert [(item.id, item.question) for item in found.items] == [(f"{number}.png", "what?") for number in range(4)]
    assert "passed over 1 file that is no picture" in found.passed_over
    with pytest.raises(DatasetError, match=r"is a folder, whose pictures have no answers; give a \.jsonl or"):
        dataset.read(tmp_path, "what?")


def test_a_question_for_rows_that_have_none(write):
    rows = [{"image": "0.png", "answers": "4"}, {"image": "1.png", "answers": "4", "question": "where?"}]
    assert [item.question for item in dataset.read(write(rows), "what?").items] == ["what?", "where?"]
