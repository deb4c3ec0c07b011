from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crosstrim.server.text import GrowingText


def decode(tokens):
    """Every byte is a token."""
    return bytes(tokens).decode("utf-8", "replace")


def pieces(content, stops=()):
    text = GrowingText(decode, stops)
    given_away = []
    for count, token in enumerate(content, 1):
        given_away.append(text.add(token))
        if text.stopped:
            return given_away, count
    return [*given_away, text.finish()], len(content)


@given(st.text(alphabet="aé€😀 \n."))
def test_pieces_are_final_and_together_the_whole(content):
    found, _ = pieces(content.encode())
    assert "".join(found) == content.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@given(st.text(alphabet="ab é", max_size=12), st.lists(st.text(alphabet="abé ", min_size=1, max_size=3), max_size=3))
def test_the_first_stop_string_ends_the_text_and_no_part_of_it_is_given_away(content, stops):
    found, count = pieces(content.encode(), stops)
    places = [content.find(stop) for stop in stops if stop in content]
    # Of stop strings, that counts which is complete first; of those, the one that begins first.
    ends = [content.find(stop) + len(stop) for stop in stops if stop in content]
    if not places:
        assert "".join(found) == content.strip()
        return
    seen = content[: min(ends)]
    assert "".join(found) == seen[: min(seen.find(stop) for stop in stops if stop in seen)].strip()
    assert count == len(seen.encode())


def test_a_character_cut_off_at_the_end_is_told_as_such():
    assert pieces("a€".encode()[:-1])[0] == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_what_may_become_a_stop_string_is_held_back_and_given_when_it_does_not():
    assert pieces(b"abcabd", ["abd"])[0] == ["", "", "abc", "", "", ""]
    assert pieces(b"xab", ["abd"])[0] == ["x", "", "", "ab"]
