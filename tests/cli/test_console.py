"""What people see of a table and of text, on a terminal and in a pipe."""

from __future__ import annotations

import contextlib
import io

import pytest

from crosstrim.cli import console
from crosstrim.errors import UnwritableError

TEXT = "a note of several words that does not fit thirty columns"


class Terminal(io.StringIO):
    """A stdout that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def printed(monkeypatch):
    """The lines that come of something."""

    def call(result, columns: int, stdout: io.StringIO) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        with contextlib.redirect_stdout(stdout):
            console.print_rich(result)
        return stdout.getvalue().splitlines()

    return call


def table():
    grid = console.grid("setting", "features", "bytes", "share")
    grid.add_row("image, eight tiles of it", "1234567", "12.345 GiB", "98.76%")
    return grid


@pytest.mark.parametrize("columns", [20, 30, 40, 50])
def test_no_word_and_no_number_is_ever_cut(printed, columns):
    words = " ".join(printed(table(), columns, Terminal())).split()
    expected = "setting features bytes share image, eight tiles of it 1234567 12.345 GiB 98.76%"
    assert sorted(words) == sorted(expected.split())


def test_a_table_is_folded_between_words_as_far_as_that_goes(printed):
    assert max(map(len, printed(table(), 45, Terminal()))) <= 45
    _, row = printed(table(), 80, Terminal())
    assert row.split("   ")[0] == "image, eight tiles of it"


def test_text_is_fitted_to_a_terminal_and_not_to_a_pipe(printed):
    assert max(map(len, printed(TEXT, 30, Terminal()))) <= 30
    assert printed(TEXT, 30, io.StringIO()) == [TEXT]


@pytest.mark.parametrize("ends", [KeyboardInterrupt, UnwritableError("a.journal cannot be written: No space left.")])
@pytest.mark.parametrize("left", [True, False])
def test_whoever_is_interrupted_or_has_a_full_disk_is_told_how_to_go_on(tmp_path, capsys, ends, left):
    journal = tmp_path / "a.journal"
    if left:
        journal.touch()
    with pytest.raises((KeyboardInterrupt, UnwritableError)), console.resumable(journal, "the same with --resume"):
        raise ends
    words = "crosstrim: interrupted; what is done is kept, and the same with --resume goes on.\n"
    assert capsys.readouterr().err == words * left
