import base64
import codecs
import json
import urllib.parse
from pathlib import Path

import pytest

from benchmarks.attacks import TRANSFORMS, Template, load_templates
from guard.errors import DataError

QUESTION = "Who wrote “Emma”? It's a café & more"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_all_transforms_that_the_data_names_are_there() -> None:
    assert set(TRANSFORMS) == {
        "none", "base64", "rot13", "hex", "leetspeak", "reverse", "urlencode", "drop_vowels",
        "spaced_letters", "cyrillic_homoglyphs", "zero_width_joiners", "uppercase",
        "split_in_two_variables",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "none"])
def test_a_transform_changes_the_text(name: str) -> None:
    assert TRANSFORMS[name](QUESTION) != QUESTION


@pytest.mark.parametrize(
    ("name", "back"),
    [
        ("none", lambda text: text),
        ("base64", lambda text: base64.b64decode(text).decode()),
        ("rot13", lambda text: codecs.decode(text, "rot13")),
        ("hex", lambda text: bytes.fromhex(text).decode()),
        ("reverse", lambda text: text[::-1]),
        ("urlencode", urllib.parse.unquote),
        ("spaced_letters", lambda text: text[::2]),
        ("zero_width_joiners", lambda text: text.replace("\u200d", "")),
    ],
)
def test_what_can_be_undone_loses_nothing(name: str, back: object) -> None:
    assert back(TRANSFORMS[name](QUESTION)) == QUESTION  # type: ignore[operator]


def test_the_others_do_what_they_say() -> None:
    assert TRANSFORMS["leetspeak"]("Is it a test") == "15 17 4 7357"
    assert TRANSFORMS["drop_vowels"]("Who was Emma") == "Wh ws mm"
    assert TRANSFORMS["uppercase"]("Emma") == "EMMA"
    assert TRANSFORMS["split_in_two_variables"]("Emma") == 'a = "Em"; b = "ma"'
    disguised = TRANSFORMS["cyrillic_homoglyphs"]("Peace")
    assert disguised == "Реасе"
    assert not disguised.isascii()


def test_a_template_takes_the_question_as_it_is() -> None:
    template = Template("x", 'Fill {"slot": "{question}"} {0} {other}', "format", "uppercase")

    assert template.wrap("a {question}?") == 'Fill {"slot": "A {QUESTION}?"} {0} {other}'


def test_templates_are_read_with_what_may_be_left_out(tmp_path: Path) -> None:
    file = write(
        tmp_path / "t.jsonl",
        {
            "id": "a",
            "template": "Say {question}",
            "kind": "k",
            "transform": "hex",
            "license": "MIT",
        },
        {"template": "{question}"},
    )

    assert load_templates(file) == [
        Template("a", "Say {question}", "k", "hex"),
        Template("2", "{question}", "other", "none"),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"kind": "k"}, "t.jsonl:2: field 'template': missing"),
        ({"template": "no slot"}, "t.jsonl:2: field 'template': holds no slot {question}"),
        (
            {"template": "{question}", "transform": "base46"},
            "t.jsonl:2: field 'transform': 'base46' is not known; did you mean 'base64'",
        ),
        ({"template": "{question}", "kind": 3}, "t.jsonl:2: field 'kind'"),
        (["{question}"], "t.jsonl:2: expected a JSON object a line"),
    ],
)
def test_a_bad_template_is_an_error_that_says_where(
    tmp_path: Path, row: object, expected: str
) -> None:
    file = write(tmp_path / "t.jsonl", {"template": "{question}"}, row)

    with pytest.raises(DataError) as caught:
        load_templates(file)
    assert expected in str(caught.value)


def test_a_missing_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        load_templates(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no rows"):
        load_templates(write(tmp_path / "empty.jsonl"))
