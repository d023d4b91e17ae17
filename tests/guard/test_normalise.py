"""Normalisation undoes disguises and can always be traced back."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.normalise import normalise


@pytest.mark.parametrize(
    ("disguised", "plain"),
    [
        ("Ｈｅｒｍｉｏｎｅ", "Hermione"),
        ("He\u200brmi\u200done", "Hermione"),
        ("Her\u00admione", "Hermione"),
        ("Неrmiоne", "Hermione"),
        ("ﬁnd", "find"),
        ("cafe\u0301", "café"),
        ("a\x00b", "ab"),
    ],
)
def test_disguises_are_undone(disguised: str, plain: str) -> None:
    assert normalise(disguised).text == plain


@pytest.mark.parametrize(
    "text", ["What is 2 + 2?\n\tTabs stay.", "Привет, мир", "γεια σου", "東京はどこですか", "naïve"]
)
def test_ordinary_text_of_any_script_is_left_alone(text: str) -> None:
    assert normalise(text).text == text


def test_a_span_is_traced_back_through_what_was_removed() -> None:
    original = "Ask He\u200br\u200bmione!"
    found = normalise(original)
    start = found.text.index("Hermione")
    begin, end = found.to_original(start, start + len("Hermione"))
    assert original[begin:end] == "He\u200br\u200bmione"


@given(st.text())
def test_every_character_has_a_source_inside_the_original(text: str) -> None:
    found = normalise(text)
    if found.origins is None:
        assert found.text == text
        return
    assert len(found.origins) == len(found.text)
    assert all(0 <= start < end <= len(text) for start, end in found.origins)
    starts = [start for start, _ in found.origins]
    assert starts == sorted(starts)


@given(st.text(alphabet=st.characters(codec="ascii", min_codepoint=32, max_codepoint=126)))
def test_printable_ascii_is_untouched(text: str) -> None:
    assert normalise(text).text == text


@given(st.text())
def test_invisible_characters_never_survive(text: str) -> None:
    kept = normalise(text).text
    assert not any(
        unicodedata.category(char) in ("Cc", "Cf") and char not in "\t\n\r" for char in kept
    )
