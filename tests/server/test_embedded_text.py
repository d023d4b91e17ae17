"""Text out of tokens: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.engines.embedded.text import Detokeniser, StopHolder


class _Tokenizer:
    """The real tokenizer with the one method that is used."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int], **_: object) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> _Tokenizer:
    return _Tokenizer(smollm2_dir / "tokenizer.json")


@pytest.mark.parametrize(
    "text",
    ["plain words, with spaces", "👩‍👩‍👧‍👦 and 😀😀", "漢字かな交じり文", "e\u0301 ñ ü", "Ω≈ç√ 🏴󠁧󠁢󠁳󠁣󠁴󠁿"],
)
def test_pieces_are_whole_characters_and_add_up(tokenizer: _Tokenizer, text: str) -> None:
    before = tokenizer.encode("before\n")
    detokeniser = Detokeniser(tokenizer, before)
    ids = tokenizer.encode(text)
    pieces = [detokeniser.push(token) for token in ids]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_half_a_character_is_never_shown(tokenizer: _Tokenizer) -> None:
    ids = tokenizer.encode("a 🏴󠁧󠁢󠁳󠁣󠁴󠁿")
    for cut in range(len(ids)):
        detokeniser = Detokeniser(tokenizer)
        text = "".join(detokeniser.push(token) for token in ids[:cut])
        assert "a 🏴󠁧󠁢󠁳󠁣󠁴󠁿".startswith(text)


def test_bytes_that_are_no_character_do_not_stop_the_answer(tokenizer: _Tokenizer) -> None:
    first_byte = tokenizer.encode("😀")[0]
    detokeniser = Detokeniser(tokenizer)
    text = "".join(detokeniser.push(first_byte) for _ in range(20))
    text += "".join(detokeniser.push(token) for token in tokenizer.encode(" and more"))
    assert text.endswith(" and more")
    text.encode()


@given(
    st.lists(st.text("abc", max_size=3), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_never_leaks(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    shown, met = _hold(pieces, stops)
    firsts = [whole.find(stop) for stop in stops if stop in whole]
    assert (met is not None) == bool(firsts)
    if not firsts:
        assert shown == whole
    else:
        assert not any(stop in shown for stop in stops)
        assert whole.startswith(shown + str(met))


def _hold(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    holder, shown = StopHolder(stops), ""
    for piece in pieces:
        text, met = holder.push(piece)
        shown += text
        if met is not None:
            return shown, met
    return shown + holder.flush(), None


def test_the_stop_string_stays_if_asked_for() -> None:
    holder = StopHolder(["ab"], include=True)
    assert holder.push("xa") == ("x", None)
    assert holder.push("by") == ("ab", "ab")
