"""What is on disk after a kill, and what it refuses to be continued with."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosstrim.data.journal import Journal
from crosstrim.errors import ResultError, UnwritableError
from crosstrim.files import write_json

HEADER = {"format": 1, "versions": {"torch": "2.12.0"}, "settings": ["a", "b"], "model": {"name": "mini"}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.json.journal"


def fill(path, *records):
    with Journal(path, HEADER) as journal:
        for record in records:
            journal.append(record)


def records(path):
    with Journal(path, HEADER) as journal:
        return list(journal.records)


def test_records_come_back(path):
    fill(path, {"a": 1}, {"a": 2})
    assert records(path) == [{"a": 1}, {"a": 2}]
    fill(path, {"a": 3})
    assert records(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_record_is_on_disk_when_append_returns(path):
    with Journal(path, HEADER) as journal:
        before = path.stat().st_size
        journal.append({"a": 1})
        assert path.read_bytes()[before:] == b'{"a": 1}\n'


def test_wherever_a_kill_cuts_only_the_last_line_is_lost(path):
    fill(path, {"a": 1}, {"text": "é\n"})
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        expected = [{"a": 1}, {"text": "é\n"}][: max(0, whole[:cut].count(b"\n") - 1)]
        assert records(path) == expected
        fill(path, {"a": 3})
        assert records(path) == [*expected, {"a": 3}]


@pytest.mark.parametrize(
    "zeros",
    [b"\0" * 9, b"\0" * 9 + b"\n", b'{"a": \0\0\0\n', b'{"a"\0\n\0\0\n\0'],
    ids=["no line", "a line", "half a line", "several lines"],
)
def test_zeros_that_a_crash_left_at_the_end_are_cut_off(path, zeros):
    fill(path, {"a": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + zeros)
    assert records(path) == [{"a": 1}]
    assert path.read_bytes() == whole
    path.write_bytes(zeros)
    assert records(path) == []


def test_damage_in_the_middle_is_told(path):
    fill(path, {"a": 1}, {"a": 2})
    path.write_bytes(path.read_bytes().replace(b'{"a": 1}', b'{"a": 1'))
    with pytest.raises(ResultError, match="is damaged; delete it to start anew"):
        records(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "2.13.0"}}, r"versions\.torch \(2\.12\.0 there, 2\.13\.0 here\)"),
        ({"settings": ["a"]}, r"with other settings \(only there: b\); run it"),
        ({"settings": ["a", "c", "d"]}, r"with other settings \(only there: b; only here: c, d\); run it"),
        ({"settings": list("acdefg")}, r"only there: b; only here: c, d, e, f, 1 more\)"),
        ({"settings": ["b", "a"]}, r"with other settings \(in another order\); run it"),
        ({"model": {"name": "mini", "dtype": "x"}}, r"model\.dtype \(None there, x here\)"),
        ({"format": 2}, r"format \(1 there, 2 here\)"),
    ],
)
def test_another_run_is_refused_by_name(path, change, words):
    fill(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(ResultError, match=words):
        Journal(path, {**HEADER, **change})
    assert path.read_bytes() == before


def test_two_at_once_are_refused(path):
    pytest.importorskip("fcntl")
    with Journal(path, HEADER), pytest.raises(ResultError, match="is being written by another run"):
        Journal(path, HEADER)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ResultError, match="cannot be written: No such file"):
        Journal(tmp_path / "no" / "a.journal", HEADER)


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is played by /dev/full")
def test_a_full_disk_is_told_with_the_path_and_leaves_what_was_written(path):
    fill(path, {"a": 1})
    with Path("/dev/full").open("ab") as full, Journal(path, HEADER) as journal:
        with journal._file:
            journal._file = full
        with pytest.raises(UnwritableError, match=rf"{path} cannot be written: No space left"):
            journal.append({"a": 2})
    assert records(path) == [{"a": 1}]


def test_a_result_is_written_where_a_link_leads(tmp_path):
    (tmp_path / "link.json").symlink_to("there.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "there.json").read_text() == '{"a": 1}\n'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.json", "there.json"]
