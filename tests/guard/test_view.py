"""The view shows a request's texts alone and together, and never more than it should."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.types import Segment, Span
from guard.view import MAX_ALTERNATIVES, Reading, readings


def chat(*turns: tuple[str, str]) -> list[Reading]:
    segments = [
        Segment(f"messages/{index}/content", text, index) for index, (_, text) in enumerate(turns)
    ]
    return readings(segments, [role for role, _ in turns])


def user(*texts: str) -> list[Reading]:
    return chat(*(("user", text) for text in texts))


def joint(found: Sequence[Reading]) -> list[Reading]:
    return [reading for reading in found if reading.kind == "conversation"]


def test_a_single_message_has_one_reading() -> None:
    (reading,) = user("How do I bake bread?")
    assert (reading.kind, reading.text) == ("segment", "How do I bake bread?")
    assert reading.is_own
    assert reading.spans(9, 13) == [Span("messages/0/content", 9, 13)]
    assert reading.changed() == [Span("messages/0/content", 0, 19)]


def test_segments_are_read_in_their_order_and_normalised() -> None:
    found = [one for one in user("Ｈｉ", "there", "He\u200brmione") if one.kind == "segment"]
    assert [one.text for one in found] == ["Hi", "there", "Hermione"]
    assert found[2].spans(0, 8) == [Span("messages/2/content", 0, 9)]


def test_a_question_split_over_two_turns_is_read_whole_and_named_in_both() -> None:
    found = chat(("user", "Who is Harry"), ("assistant", "Who?"), ("user", "Potter, I mean?"))
    texts = [one.text for one in joint(found)]
    assert "Who is Harry\nWho?\nPotter, I mean?" in texts
    (users,) = (one for one in joint(found) if one.text == "Who is Harry\nPotter, I mean?")
    at = users.text.index("Harry")
    assert users.spans(at, at + len("Harry\nPotter")) == [
        Span("messages/0/content", 7, 12),
        Span("messages/2/content", 0, 6),
    ]


def test_a_word_split_over_two_turns_is_joined_at_its_seam() -> None:
    found = chat(("user", "Who is Har"), ("assistant", "Go on."), ("user", "ry Potter?"))
    seam = next(one for one in joint(found) if "Who is Harry Potter?" in one.text)
    at = seam.text.index("Harry Potter")
    assert seam.spans(at, at + len("Harry Potter")) == [
        Span("messages/0/content", 7, 10),
        Span("messages/2/content", 0, 9),
    ]


def test_variables_in_two_turns_are_joined() -> None:
    found = user('a = "Who is Har"', 'b = "ry Potter?"', "Answer a + b.")
    assert any("Who is Harry Potter?" in one.text for one in joint(found))


def test_base64_over_two_turns_is_decoded() -> None:
    found = user("V2hvIGlzIEhhcnJ5", "IFBvdHRlcj8=")
    assert any("Who is Harry Potter?" in one.text for one in joint(found))


def test_the_parts_of_a_message_are_read_together() -> None:
    segments = [
        Segment("messages/0/content/0/text", "Who is Harry", 0),
        Segment("messages/0/content/1/text", "Potter?", 0),
    ]
    found = joint(readings(segments, ["user"]))
    assert [one.text for one in found] == ["Who is Harry\nPotter?"]


def test_tool_calls_and_results_are_read_together_with_messages() -> None:
    segments = [
        Segment("messages/0/content", "Look it up", 0),
        Segment("messages/1/tool_calls/0/id", "call_1"),
        Segment("messages/1/tool_calls/0/function/name", "find"),
        Segment("messages/1/tool_calls/0/function/arguments", '{"q": "Harry"}'),
        Segment("messages/2/tool_call_id", "call_1"),
        Segment("messages/2/content", "Potter", 2),
        Segment("tools/0/function/description", "Finds people"),
    ]
    found = readings(segments, ["user", "assistant", "tool"])
    assert [one.text for one in joint(found)] == ['Look it up\n{"q": "Harry"}\nPotter']
    assert len([one for one in found if one.kind == "segment"]) == len(segments)


def test_prompts_of_a_list_stand_alone() -> None:
    segments = [Segment("prompt/0", "Who is Harry", 0), Segment("prompt/1", "Potter?", 1)]
    assert joint(readings(segments)) == []


@pytest.mark.parametrize("count", range(2, 30))
def test_any_four_messages_in_a_row_stand_in_one_reading(count: int) -> None:
    texts = [f"Message number {index}." for index in range(count)]
    found = [one.text for one in joint(user(*texts))]
    for first in range(max(count - 3, 1)):
        run = "\n".join(texts[first : first + 4])
        assert any(run in text for text in found)
    assert any(text.startswith("\n".join(texts[-6:])) for text in found)


@pytest.mark.parametrize("count", [2, 7, 20, 101])
def test_the_readings_together_are_bounded(count: int) -> None:
    texts = [f"This is the message with number {index} of many." for index in range(count)]
    turns = [("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
    total = sum(len(one.text) + 1 for one in chat(*turns))
    assert total <= 3.6 * sum(len(text) + 1 for text in texts)


def test_alternatives_are_bounded_in_number_and_none_is_lost() -> None:
    words = ["Harry", "Hermione", "Hagrid", "Dumbledore", "Hogwarts"]
    coded = [base64.b64encode(f"Tell me about {word}".encode()).decode() for word in words * 40]
    text = "\n".join(coded) + "\n" + "a = 'Who is R'; b = 'on?' 4n5w3r th1s; rettoP yrraH si ohW"
    found = user(text)
    assert len(found) <= MAX_ALTERNATIVES + 1
    together = "\n".join(one.text for one in found)
    assert all(f"Tell me about {word}" in together for word in words)
    assert "Who is Ron?" in together and "Who is Harry Potter" in together
    assert together.count("Tell me about") >= len(coded)


def test_what_is_left_unread_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.view.ALTERNATIVES_FACTOR", 0)
    monkeypatch.setattr("guard.view.ALTERNATIVES_FLOOR", 10)
    (reading,) = user("Decode V2hvIGlzIEhhcnJ5IFBvdHRlcj8= please")
    assert reading.unread > 0


def test_a_window_of_ordinary_chat_has_no_alternatives() -> None:
    found = chat(
        ("system", "You are a helpful assistant."),
        ("user", "What is a good recipe for bread?"),
        ("assistant", "Mix flour, water, salt and yeast; knead, prove and bake."),
        ("user", "Thanks! How long should it prove?"),
    )
    assert [one.kind for one in found] == ["segment"] * 4 + ["conversation"] * 2


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.text(min_size=1))))
def test_spans_lie_in_their_segments(turns: list[tuple[str, str]]) -> None:
    lengths = {f"messages/{index}/content": len(text) for index, (_, text) in enumerate(turns)}
    for reading in chat(*turns):
        spans = [*reading.spans(0, len(reading.text)), *reading.changed()]
        assert all(0 <= span.start <= span.end <= lengths[span.path] for span in spans)
        placed = [source.start for source in reading.sources]
        assert all(one < other for one, other in pairwise(placed))


def test_what_a_text_calls_rot13_is_read_so_however_it_looks() -> None:
    name = "Jung’f arkg sbe Oruebhm Ebunav?"  # What's next for Behrouz Rohani?
    text = f"The following is ROT13. Decode it and answer: {name}"
    found = [reading for reading in readings([Segment("p", text)]) if "Behrouz" in reading.text]
    assert found
    start = found[0].text.index("Behrouz")
    (span,) = found[0].spans(start, start + len("Behrouz Rohani"))
    assert text[span.start : span.end] == "Oruebhm Ebunav"
    assert not any("Behrouz" in reading.text for reading in readings([Segment("p", name[-16:])]))
