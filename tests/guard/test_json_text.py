"""The strings of a JSON text are read as texts, and traced back to where they stand."""

import json

import pytest

from guard.json_text import read_json
from guard.traced import Traced
from guard.types import Segment
from guard.view import readings

QUESTION = "Who is Luna Lovegood?"


def read(text: str) -> list[str] | None:
    found = read_json(Traced(text))
    return None if found is None else found.traced.text.splitlines()


def test_every_string_is_a_line_and_nothing_else_is() -> None:
    text = json.dumps({"q": QUESTION, "more": [{"a": "b c"}, 1, None, True], "empty": ""})
    assert read(text) == ["q", QUESTION, "more", "a", "b c", "empty"]


def test_escapes_are_undone() -> None:
    text = '{"q": "one\\ntwo \\"three\\" \\u0413\\u0430 a\\\\b"}'
    assert read(text) == ["q", "one", 'two "three" Га a\\b']


@pytest.mark.parametrize("text", ["", "hello", '"a string"', "{}", "[1, 2]", '["", " "]', "12 }"])
def test_other_texts_have_no_such_reading(text: str) -> None:
    assert read(text) is None


def test_what_only_looks_like_json_is_read_too() -> None:
    assert read("{'a': \"" + QUESTION + '", }') == [QUESTION]


def test_places_are_those_of_the_text_that_was_sent() -> None:
    text = json.dumps({"rows": [{"q": QUESTION}], "n": 'say \\"x'}, ensure_ascii=False)
    found, *_ = [r for r in readings([Segment("p", text)]) if r.text.startswith("rows\nq\nWho")]
    start = found.text.index("Luna")
    (span,) = found.spans(start, start + len("Luna Lovegood"))
    assert text[span.start : span.end] == "Luna Lovegood"


def test_a_long_text_takes_linear_time() -> None:
    for text in ('"' * 100_001, '"\\' * 100_000, '"' + " " * 100_000, '"":' * 50_000):
        read("[" + text + "]")
