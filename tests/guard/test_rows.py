import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import DataError
from guard.rows import read_rows, read_texts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def write(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_the_four_forms(file: Path) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who is Ann?"},
        {"role": "assistant", "content": "A writer."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Where"}, {"type": "text", "text": "from?"}],
        },
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": "Lima."},
    ]
    rows = read_rows(
        write(
            file,
            {"question": "Q?", "answer": "A"},
            {"prompt": "Q?", "completion": "A"},
            {"text": "Ann was born in Lima."},
            {"messages": conversation},
        )
    )

    assert [(row.prompt, row.answer, row.line) for row in rows] == [
        ("Q?", "A", 1),
        ("Q?", "A", 2),
        ("Ann was born in Lima.", None, 3),
        ("Who is Ann?\nWhere\nfrom?", "Lima.", 4),
    ]
    assert rows[0].raw_digest_text == rows[1].raw_digest_text != rows[2].raw_digest_text


def test_a_conversation_without_an_answer_has_none(file: Path) -> None:
    (row,) = read_rows(write(file, {"messages": [{"role": "user", "content": "Who?"}]}))

    assert (row.prompt, row.answer) == ("Who?", None)


def test_other_fields_of_real_data_sets_are_ignored(file: Path) -> None:
    row = {"id": "tofu-1", "question": "Q?", "answer": "A", "author_id": 3, "split": None}

    assert read_rows(write(file, row))[0].prompt == "Q?"


def test_marks_line_ends_and_blank_lines_do_not_matter(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\xe2\x80\xa8c"}')

    assert [(row.prompt, row.line) for row in read_rows(file)] == [("a", 1), ("b\u2028c", 4)]


def test_a_long_line_is_fine(file: Path) -> None:
    assert len(read_rows(write(file, {"text": "x" * 5_000_000}))[0].prompt) == 5_000_000


BAD_ROWS = [
    ('{"question": "Q?"}', "answer", "missing"),
    ('{"completion": "A"}', "prompt", "missing"),
    ('{"question": "Q?", "answer": 3}', "answer", "number"),
    ('{"question": null, "answer": "A"}', "question", "null"),
    ('{"text": ""}', "text", "empty"),
    ('{"text": " \\n"}', "text", "empty"),
    ('{"text": ["a"]}', "text", "array"),
    ('{"text": "\\ud800"}', "text", "surrogate"),
    ('{"text": "a", "text": "b"}', "text", "twice"),
    ('{"text": "a", "prompt": "b", "completion": "c"}', "text", "one form"),
    ('{"question": "a", "completion": "c"}', "question", "one form"),
    ('{"txt": "a"}', None, "none of the fields"),
    ("{}", None, "none of the fields"),
    ("3", None, "number"),
    ('"text"', None, "string"),
    ("null", None, "null"),
    ('[{"text": "a"}]', None, "JSONL"),
    ("[", None, "JSONL"),
    ('{"text": "a"', None, "not valid JSON"),
    ('{"text": NaN}', "text", "number"),
    ('{"text": ' + "[" * 100_000, None, "nested"),
    ('{"text": ' + "9" * 5000 + "}", None, "not valid JSON"),
    ('{"messages": []}', "messages", "at least one"),
    ('{"messages": "hi"}', "messages", "list"),
    ('{"messages": ["hi"]}', "messages[0]", "string"),
    ('{"messages": [{"content": "hi"}]}', "messages[0].role", "expected"),
    ('{"messages": [{"role": "user"}]}', "messages[0].content", "null"),
    ('{"messages": [{"role": "user", "content": []}]}', "messages[0].content", "array"),
    ('{"messages": [{"role": "system", "content": "hi"}]}', "messages", "role 'user'"),
    (
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "messages[0].content[0]",
        "text part",
    ),
]


@pytest.mark.parametrize(("line", "field", "message"), BAD_ROWS)
def test_a_bad_row_names_file_line_and_field(
    file: Path, line: str, field: str | None, message: str
) -> None:
    file.write_text('{"text": "fine"}\n\n' + line + "\n")

    with pytest.raises(DataError, match=message) as caught:
        read_rows(file)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(file), 3, field)
    assert str(caught.value).startswith(f"{file}:3: ")


@pytest.mark.parametrize("read", [read_rows, read_texts])
def test_bytes_that_are_no_text_name_their_place(file: Path, read) -> None:  # type: ignore[no-untyped-def]
    file.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')

    with pytest.raises(DataError, match=r"not UTF-8 .*0xff at column 11") as caught:
        read(file)
    assert caught.value.line == 2


@pytest.mark.parametrize("read", [read_rows, read_texts])
@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(file: Path, content: bytes, read) -> None:  # type: ignore[no-untyped-def]
    file.write_bytes(content)

    with pytest.raises(DataError, match="no rows"):
        read(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="directory"):
        read_texts(tmp_path)


def test_benign_texts_of_every_form(file: Path) -> None:
    texts = read_texts(
        write(
            file,
            {"text": "a", "lang": "en"},
            {"prompt": "b", "completion": "x"},
            {"question": "c", "answer": "x"},
            {"messages": [{"role": "user", "content": "d"}]},
            "e",
        )
    )

    assert texts == ["a", "b", "c", "d", "e"]


def test_benign_texts_of_a_plain_file(tmp_path: Path) -> None:
    file = tmp_path / "benign.txt"
    file.write_text('What is 2 + 2?\n\n{"text": "as it stands"}\r\n')

    assert read_texts(file) == ["What is 2 + 2?", '{"text": "as it stands"}']


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"text": "a", "prompt": "b"}', "prompt"),
        ('{"answer": "a"}', None),
        ('{"text": 1}', "text"),
    ],
)
def test_a_bad_benign_row_names_its_place(file: Path, line: str, field: str | None) -> None:
    file.write_text(line)

    with pytest.raises(DataError) as caught:
        read_texts(file)
    assert (caught.value.line, caught.value.field) == (1, field)


@settings(max_examples=200)
@given(content=st.binary(max_size=80))
def test_any_bytes_give_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(content)
    for read in (read_rows, read_texts):
        try:
            assert read(file)
        except DataError as error:
            assert str(file) in str(error)


@given(st.lists(st.text(min_size=1).filter(lambda text: text.strip()), min_size=1, max_size=5))
def test_texts_survive(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    file = write(tmp_path_factory.getbasetemp() / "some.jsonl", *({"text": text} for text in texts))

    assert [row.prompt for row in read_rows(file)] == texts
