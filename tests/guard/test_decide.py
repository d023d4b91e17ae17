import json
import threading
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.decide import decide_line, decide_lines
from guard.errors import StageError
from guard.request import ParsedRequest
from guard.types import Decision, Span, TargetHit


class WordGuard:
    """Flags every text that holds `secret`; fails on `crash`."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def decide(self, request: ParsedRequest) -> Decision:
        return self.decide_many([request])[0]

    def decide_many(self, requests: Sequence[ParsedRequest]) -> list[Decision]:
        self.batches.append(len(requests))
        return [self._one(request) for request in requests]

    def _one(self, request: ParsedRequest) -> Decision:
        spans = []
        for segment in request.segments(lambda ids: "secret"):
            if "crash" in segment.text:
                raise StageError("detect", RuntimeError("crashed"))
            at = segment.text.find("secret")
            if at >= 0:
                spans.append(Span(segment.path, at, at + 6))
        if not spans:
            return Decision(False, "pass", 1.0, ())
        hit = TargetHit("ann", 1.5, 0.001, 0.9, tuple(spans), enforced=True)
        return Decision(True, "corrupt", 1.0, (hit,), margin=0.25)


def decide(value: object, number: int = 1) -> dict[str, object]:
    return decide_line(WordGuard(), json.dumps(value), number)


def test_a_flagged_line_has_all_that_the_issue_names() -> None:
    row = decide({"id": "a", "messages": [{"role": "user", "content": "é secret"}], "target": "x"})

    assert row == {
        "id": "a",
        "flagged": True,
        "route": "corrupt",
        "coverage": 1.0,
        "margin": 0.25,
        "targets": [
            {
                "name": "ann",
                "score": 1.5,
                "p_value": 0.001,
                "weight": 0.9,
                "spans": [{"path": "messages/0/content", "start": 2, "end": 8}],
            }
        ],
    }


def test_a_clear_line_has_the_same_fields() -> None:
    assert decide({"text": "hello"}, 7) == {
        "id": 7,
        "flagged": False,
        "route": "pass",
        "coverage": 1.0,
        "margin": None,
        "targets": [],
    }


@pytest.mark.parametrize("name", ["prompt", "text", "question"])
def test_the_span_is_in_the_field_that_was_given(name: str) -> None:
    row = decide({"id": 0, name: "a secret", "answer": "secret", "category": "c", "attack": None})

    assert row["id"] == 0
    assert row["targets"][0]["spans"] == [{"path": name, "start": 2, "end": 8}]  # type: ignore[index]


@pytest.mark.parametrize(
    ("endpoint", "body", "path"),
    [
        (
            "/v1/chat/completions",
            {"model": "m", "messages": [{"role": "system", "content": "secret"}]},
            "messages/0/content",
        ),
        ("/v1/completions", {"model": "m", "prompt": ["a", "secret"]}, "prompt/1"),
        ("/v1/completions", {"model": "m", "prompt": [1, 2, 3]}, "prompt"),
    ],
)
def test_a_whole_request_is_parsed_as_the_server_does(
    endpoint: str, body: object, path: str
) -> None:
    row = decide({"endpoint": endpoint, "body": body})

    assert row["targets"][0]["spans"][0]["path"] == path  # type: ignore[index]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "not a JSON object"),
        (b"   ", "not a JSON object"),
        (b"{", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b'{"id": 1}', "found none"),
        (b'{"text": "a", "prompt": "b"}', "found prompt and text"),
        (b'{"text": 3}', "text: expected a string"),
        (b'{"text": null}', "text: expected a string"),
        (b'{"messages": "hi"}', "messages"),
        (b'{"messages": []}', "messages"),
        (b'{"endpoint": 1, "body": {}}', "endpoint"),
        (b'{"endpoint": "/v1/chat/completions"}', "body"),
        (b'{"endpoint": "/v1/embeddings", "body": {"model": "m"}}', "endpoint"),
        (b'{"endpoint": "/v1/completions", "body": {"model": "m", "prompt": "a", "x": 1}}', "x"),
        (b'{"endpoint": "/v1/completions", "body": {"prompt": "a", "prompt": "b"}}', "prompt"),
        (b'{"text": "\\ud800"}', ""),
        (b'{"text": "\\ud800 and more"}', ""),
        (b'{"text": "\xff"}', ""),
    ],
)
def test_what_the_server_would_refuse_is_an_error(line: bytes, message: str) -> None:
    row = decide_line(WordGuard(), line, 3)

    assert set(row) == {"id", "error"}
    assert message in str(row["error"])


def test_an_error_keeps_the_id_of_its_line() -> None:
    assert decide({"id": "x", "text": 3})["id"] == "x"
    assert decide({"id": {"a": 1}, "messages": []})["id"] == {"a": 1}
    assert decide({"id": "x", "text": "\ud800"})["id"] == "x"
    assert decide_line(WordGuard(), "nonsense", 12)["id"] == 12
    assert decide_line(WordGuard(), '{"id": ' + "9" * 5000 + "}", 12)["id"] == 12


def test_one_bad_line_or_failing_decision_leaves_the_others() -> None:
    texts = ["one", "crash", "secret", 3, "crash", "five"]
    lines = [json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts)]

    rows = list(decide_lines(WordGuard(), lines))

    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row.get("flagged") for row in rows] == [False, None, True, None, None, False]
    assert "crashed" in rows[1]["error"]


def test_many_lines_are_decided_together_and_come_in_order() -> None:
    guard = WordGuard()
    lines = [json.dumps({"text": str(number)}).encode() for number in range(1000)]

    rows = list(decide_lines(guard, lines))

    assert [row["id"] for row in rows] == list(range(1, 1001))
    assert max(guard.batches) <= 64


def test_a_line_that_comes_alone_is_answered_before_the_next() -> None:
    asked = threading.Event()

    def lines() -> Iterator[bytes]:
        yield b'{"text": "a"}\n'
        assert asked.wait(60)
        yield b'{"text": "secret"}\r\n'

    rows = decide_lines(WordGuard(), lines())
    assert next(rows)["flagged"] is False
    asked.set()
    assert next(rows)["flagged"] is True
    assert list(rows) == []


def test_a_failing_reader_is_not_swallowed() -> None:
    def lines() -> Iterator[bytes]:
        yield b'{"text": "a"}'
        raise OSError("gone")

    rows = decide_lines(WordGuard(), lines())
    assert next(rows)["id"] == 1
    with pytest.raises(OSError, match="gone"):
        next(rows)


def test_a_body_longer_than_the_server_takes_is_an_error() -> None:
    (row,) = decide_lines(WordGuard(), [json.dumps({"text": "x" * 5000}).encode()], 1000)

    assert "longer than 1000 bytes" in row["error"]


def test_a_mark_at_the_start_does_not_matter() -> None:
    assert decide_line(WordGuard(), b'\xef\xbb\xbf{"text": "secret"}', 1)["flagged"] is True


@given(st.binary(max_size=60))
def test_any_line_gives_a_decision_or_an_error(line: bytes) -> None:
    row = decide_line(WordGuard(), line, 1)

    assert "error" in row or "flagged" in row


@given(st.text(max_size=30).filter(lambda text: "crash" not in text))
def test_spans_count_code_points_of_the_original(text: str) -> None:
    row = decide({"text": text + "secret"})

    if "error" not in row:
        (span,) = row["targets"][0]["spans"]  # type: ignore[index]
        assert (text + "secret")[span["start"] : span["end"]] == "secret"
