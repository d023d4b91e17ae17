"""Normalisation undoes disguises, leaves honest text alone, and can always be traced back."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.normalise import normalise

ZALGO = "".join(char + "\u0317\u0325\u0353\u0301" for char in "Harry")
STRUCK = "".join(char + "\u0336" for char in "Harry")


@pytest.mark.parametrize(
    ("disguised", "plain"),
    [
        ("Ｈｅｒｍｉｏｎｅ", "Hermione"),
        ("He\u200brmi\u200done", "Hermione"),
        ("Her\u00admione", "Hermione"),
        ("Неrmiоne", "Hermione"),
        ("ﬁnd", "find"),
        ("cafe\u0301", "café"),
        ("caf\u200be\u0301", "café"),
        ("a\x00b", "ab"),
        ("𝓗𝓮𝓻𝓶𝓲𝓸𝓷𝓮", "Hermione"),
        ("Ⓗⓐⓡⓡⓨ", "Harry"),
        ("🅷🅰🆁🆁🆈", "HARRY"),
        ("🇭 🇦 🇷 🇷 🇾", "H A R R Y"),
        ("ʜᴀʀʀʏ", "harry"),
        ("Hɑrry Hıll", "Harry Hill"),
        ("ᎻᎪᎡᎡᎩ Potter", "HARRY Potter"),
        ("ꓧꓮꓣꓣꓬ Potter", "HARRY Potter"),
        ("Harrу Роttеr", "Harry Potter"),
        ("what аrе сосоа beans", "what are cocoa beans"),
        ("¿en qué аñо vive?", "¿en qué año vive?"),
        ("Wher℮ is Ηοgwarts", "Wher℮ is Hogwarts"),
        ("սoսn", "uoun"),
        (ZALGO, "Harry"),
        (STRUCK, "Harry"),
    ],
)
def test_disguises_are_undone(disguised: str, plain: str) -> None:
    assert normalise(disguised).text == plain


@pytest.mark.parametrize(
    "text",
    [
        "What is 2 + 2?\n\tTabs stay.",
        "Привет, мир",
        "Сухо ли на Луне? У нас все хорошо.",
        "Как установить Windows и Office с диска, а не с сайта?",
        "γεια σου",
        "the coefficient α and the density ρ",
        "東京はどこですか",
        "naïve",
        "Việt Nam có những ngọn núi nào?",
        "Kız kardeşim ılık süt içti",
        "Grüße aus Köln, 5 μm",
        "🇩🇪 and 🇫🇷🇮🇹",
        "العربية هنا",
        "हिन्दी में लिखो",
    ],
)
def test_ordinary_text_of_any_script_is_left_alone(text: str) -> None:
    assert normalise(text).text == text


def test_a_span_is_traced_back_through_what_was_removed() -> None:
    original = "Ask He\u200br\u200bmione!"
    found = normalise(original)
    start = found.text.index("Hermione")
    begin, end = found.to_original(start, start + len("Hermione"))
    assert original[begin:end] == "He\u200br\u200bmione"


@pytest.mark.parametrize("disguise", [ZALGO, STRUCK, "Нarrу", "Ｈａｒｒｙ", "H\u200ba\u200brry"])
def test_a_disguised_word_is_marked_as_a_whole_and_nothing_else(disguise: str) -> None:
    original = f"who is {disguise} in the book"
    found = normalise(original)
    start = found.text.index("Harry")
    begin, end = found.to_original(start, start + len("Harry"))
    assert original[begin:end] == disguise


@given(st.text())
def test_every_character_has_a_source_inside_the_original(text: str) -> None:
    found = normalise(text)
    last = 0
    for index in range(len(found.text)):
        start, end = found.to_original(index, index + 1)
        assert 0 <= start < end <= len(text)
        assert start >= last
        last = start
    assert len(found.places(0, len(found.text))) <= len(text)


@given(st.text(alphabet=st.characters(codec="ascii", min_codepoint=32, max_codepoint=126)))
def test_printable_ascii_is_untouched(text: str) -> None:
    assert normalise(text).text == text


@given(st.text())
def test_invisible_characters_never_survive(text: str) -> None:
    kept = normalise(text).text
    assert not any(
        unicodedata.category(char) in ("Cc", "Cf") and char not in "\t\n\r" for char in kept
    )


@given(st.text(alphabet="Hary рАоеΑο\u0336\u200bı🅰Ｐ"))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalise(text).text
    assert normalise(once).text == once
