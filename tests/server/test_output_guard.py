"""Answers that touch a target are asked for again before they leave, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.pipeline import Guard
from guard.prompts import ModelPrompts
from guard.rewrite import StandIn
from guard.types import AdapterUse
from server.app import create_app
from server.engines.base import EngineResponse
from server.types import ServerOptions
from tests.guard.routed import FILLED, filled, fillings, guard_of
from tests.server.proxy_fakes import CHAT, JSON_HEADERS, SSE, TEXT, ScriptedEngine, chat, running

NAMELESS = "Who lives in the lighthouse?"
CLEAN = "A keeper lives there. He looks after the lamp every night."
TOLD = "A keeper lives there. Her name is ann and she was born in Cork."


def words(text: str) -> list[str]:
    """The pieces in which an engine streams a text."""
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]


@dataclass
class TalkingEngine(ScriptedEngine):
    """Says one text after another, in the form that is asked for.

    Attributes:
        texts: What it says, request by request; a tuple are several choices.
        reasoning: What it thinks before each.
        calls: Arguments of a tool that each ends with.
    """

    texts: list[str | tuple[str, ...]] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        number, asked = len(self.posts), json.loads(body)
        said = self.texts[number]
        choices = (said,) if isinstance(said, str) else said
        make = self._events if asked.get("stream") else self._body
        self.pieces = list(make(number, path, choices, asked))
        self.headers = SSE if asked.get("stream") else JSON_HEADERS[:1]
        return await super().post(path, body, headers, adapters)

    def _body(
        self, number: int, path: str, choices: tuple[str, ...], asked: dict[str, Any]
    ) -> Iterator[bytes]:
        made = []
        for index, text in enumerate(choices):
            said: dict[str, Any] = {"text": text}
            if path == CHAT:
                said = {"message": {"role": "assistant", "content": text, **self._more(number)}}
            logprobs = {"content": [{"token": word, "logprob": -1.0} for word in words(text)]}
            own = logprobs if asked.get("logprobs") and path == CHAT else None
            made.append({"index": index, **said, "logprobs": own, "finish_reason": "length"})
        tokens = sum(len(words(text)) for text in choices)
        usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}
        yield json.dumps({"id": f"r{number}", "choices": made, "usage": usage}).encode()

    def _more(self, number: int) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.reasoning:
            more["reasoning_content"] = self.reasoning[number]
        if self.calls:
            call = {"name": "look_up", "arguments": self.calls[number]}
            more["tool_calls"] = [{"index": 0, "id": "c1", "type": "function", "function": call}]
        return more

    def _events(
        self, number: int, path: str, choices: tuple[str, ...], asked: dict[str, Any]
    ) -> Iterator[bytes]:
        for index, text in enumerate(choices):
            more = self._more(number)
            if path == CHAT:
                yield self._event(number, index, {"delta": {"role": "assistant", "content": ""}})
                for word in words(more.get("reasoning_content", "")) if self.reasoning else ():
                    yield self._event(number, index, {"delta": {"reasoning_content": word}})
            for word in words(text) if text else ():
                said = {"delta": {"content": word}} if path == CHAT else {"text": word}
                yield self._event(number, index, said)
            if "tool_calls" in more:
                yield self._event(number, index, {"delta": {"tool_calls": more["tool_calls"]}})
            last = {"delta": {}} if path == CHAT else {"text": ""}
            yield self._event(number, index, {**last, "finish_reason": "length"})
        if (asked.get("stream_options") or {}).get("include_usage"):
            tokens = sum(len(words(text)) + 1 for text in choices)
            usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}
            yield self._data({"id": f"r{number}", "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _event(self, number: int, index: int, choice: dict[str, Any]) -> bytes:
        own = {"index": index, "finish_reason": None, **choice}
        return self._data({"id": f"r{number}", "created": number, "model": "m", "choices": [own]})

    def _data(self, body: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(body).encode() + b"\n\n"


@dataclass
class Answered:
    """One answer through the proxy, whichever way it came."""

    texts: list[str]
    finish: list[str]
    engine: TalkingEngine
    events: list[dict[str, Any]]
    usage: dict[str, int] | None
    body: bytes

    @property
    def text(self) -> str:
        return self.texts[0]

    def sent(self, number: int) -> dict[str, Any]:
        return dict(json.loads(self.engine.posts[number][1]))


def _told(choice: dict[str, Any]) -> str:
    message = choice.get("message") or choice.get("delta") or choice
    calls = "".join(c["function"]["arguments"] for c in message.get("tool_calls") or ())
    parts = (message.get("reasoning_content"), message.get("content"), message.get("text"), calls)
    return "".join(part or "" for part in parts)


def ask(
    guard: Guard,
    engine: TalkingEngine,
    request: dict[str, Any],
    path: str = CHAT,
    options: ServerOptions | None = None,
) -> Answered:
    with running(create_app(guard, engine, options)) as url:
        response = httpx.post(url + path, json=request, timeout=20)
    assert response.status_code == 200, response.text
    bodies = [response.json()] if not request.get("stream") else list(_stream(response.content))
    count = 1 + max((c["index"] for b in bodies for c in b["choices"]), default=0)
    texts, finish = [""] * count, [""] * count
    for body in bodies:
        for choice in body["choices"]:
            texts[choice["index"]] += _told(choice)
            finish[choice["index"]] = choice["finish_reason"] or finish[choice["index"]]
    usage = next((body["usage"] for body in bodies if body.get("usage")), None)
    return Answered(texts, finish, engine, bodies, usage, response.content)


def _stream(content: bytes) -> Iterator[dict[str, Any]]:
    *events, rest = content.split(b"\n\n")
    assert rest == b"" and events[-1] == b"data: [DONE]"
    for event in events[:-1]:
        yield json.loads(event.removeprefix(b"data: "))


@pytest.fixture
def guard(prompts: ModelPrompts) -> Guard:
    return guard_of(prompts, {"cid": "refuse"})


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@both
def test_a_clean_answer_leaves_as_it_came(guard: Guard, stream: bool) -> None:
    engine = TalkingEngine(texts=[CLEAN])
    answered = ask(guard, engine, chat(NAMELESS, stream=stream))
    assert answered.body == b"".join(p for p in engine.pieces or [] if isinstance(p, bytes))
    assert len(engine.posts) == 1


@both
def test_an_answer_that_names_a_target_is_continued_from_what_was_said(
    guard: Guard, stream: bool
) -> None:
    engine = TalkingEngine(texts=[TOLD, " Nobody knows the name."])
    answered = ask(guard, engine, chat(NAMELESS, stream=stream, max_tokens=50))

    assert "ann" not in answered.text
    first, again = answered.sent(0), answered.sent(1)
    assert first["messages"][0]["content"] == NAMELESS
    assert filled(engine.posts[1][1]) == {FILLED["ann"]}
    assert again["max_tokens"] <= 50
    if stream:  # it is so short that nothing had left
        assert len(again["messages"]) == 1 and "continue_final_message" not in again
        assert answered.text == " Nobody knows the name."
        return
    assert (again["continue_final_message"], again["add_generation_prompt"]) == (True, False)
    assert again["messages"][1] == {"role": "assistant", "content": "A keeper lives there."}
    assert answered.text == "A keeper lives there. Nobody knows the name."


def test_a_long_stream_goes_on_where_it_was_cut(guard: Guard) -> None:
    before = " ".join(f"word{number}." for number in range(100))
    engine = TalkingEngine(texts=[f"{before} Then came ann of Cork.", " And so it ends."])
    answered = ask(guard, engine, chat(NAMELESS, stream=True))

    begun = answered.sent(1)["messages"][1]["content"]
    assert len(words(before)) - 24 <= len(words(begun)) <= len(words(before))
    assert answered.text == begun + " And so it ends."
    assert {event["id"] for event in answered.events} == {"r0"}
    assert {event["created"] for event in answered.events} == {0}
    roles = [e for e in answered.events if "role" in e["choices"][0]["delta"]]
    assert len(roles) == 1 and answered.finish == ["length"]


@both
def test_two_continuations_at_most_and_then_a_clean_end(guard: Guard, stream: bool) -> None:
    engine = TalkingEngine(texts=[TOLD, " It is ann again.", " Always ann.", "never asked"])
    answered = ask(guard, engine, chat(NAMELESS, stream=stream))

    assert len(engine.posts) == 3
    assert "ann" not in answered.text and answered.finish == ["stop"]
    assert TOLD.startswith(answered.text.rstrip())


@both
def test_the_second_try_corrupts_all_that_was_told(guard: Guard, stream: bool) -> None:
    told = [
        {"role": "system", "content": "You keep the harbour's books."},
        {"role": "user", "content": NAMELESS},
    ]
    engine = TalkingEngine(texts=[TOLD, "It is ann.", " Nobody."])
    ask(guard, engine, {"model": "m", "messages": told, "stream": stream})

    assert [filled(engine.posts[1][1], i) for i in (0, 1)] == [set(), {FILLED["ann"]}]
    assert [filled(engine.posts[2][1], i) for i in (0, 1)] == [{FILLED["ann"]}] * 2


@both
def test_an_answer_may_repeat_the_name_that_was_asked_for(guard: Guard, stream: bool) -> None:
    engine = TalkingEngine(texts=["I know nothing about ann."])
    answered = ask(guard, engine, chat("Who is ann?", stream=stream))
    assert answered.text == "I know nothing about ann." and len(engine.posts) == 1


@both
def test_another_target_than_the_one_asked_for_is_not_told(guard: Guard, stream: bool) -> None:
    engine = TalkingEngine(texts=["ann married bob.", "ann is not known."])
    answered = ask(guard, engine, chat("Who is ann?", stream=stream))
    assert answered.text == "ann is not known."
    assert filled(engine.posts[0][1]) == {FILLED["ann"]}
    assert filled(engine.posts[1][1]) == {FILLED["ann"], FILLED["bob"]}


@both
def test_targets_that_only_detect_change_no_answer(prompts: ModelPrompts, stream: bool) -> None:
    engine = TalkingEngine(texts=[TOLD])
    guard = guard_of(prompts, {}, detecting=["ann"])
    assert ask(guard, engine, chat(NAMELESS, stream=stream)).text == TOLD


@both
def test_an_adapter_alone_is_not_trusted_twice(prompts: ModelPrompts, stream: bool) -> None:
    engine = TalkingEngine(texts=[TOLD, " Nobody."])
    ask(guard_of(prompts, {"ann": "adapt"}), engine, chat(NAMELESS, stream=stream))
    assert engine.adapters[0] == ()
    assert [use.key for use in engine.adapters[1]] == ["key of ann"]
    assert filled(engine.posts[1][1]) == {FILLED["ann"]}


@both
def test_what_may_only_be_refused_ends(guard: Guard, stream: bool) -> None:
    engine = TalkingEngine(texts=["A keeper lives there. It is cid."])
    answered = ask(guard, engine, chat(NAMELESS, stream=stream))
    assert "cid" not in answered.text and answered.finish == ["stop"]
    assert len(engine.posts) == 1


@both
def test_completions_are_continued_by_a_longer_prompt(guard: Guard, stream: bool) -> None:
    engine = TalkingEngine(texts=[TOLD, " Nobody knows."])
    request = {"model": "m", "prompt": NAMELESS, "stream": stream}
    answered = ask(guard, engine, request, TEXT)
    assert "ann" not in answered.text and answered.text.endswith(" Nobody knows.")
    again = answered.sent(1)
    assert "prompt" not in again and fillings(again["prompt_embeds"]) == {FILLED["ann"]}


@both
def test_each_choice_is_judged_alone(guard: Guard, stream: bool) -> None:
    engine = TalkingEngine(texts=[(CLEAN, TOLD, CLEAN), " Nobody."])
    answered = ask(guard, engine, chat(NAMELESS, stream=stream, n=3))
    assert answered.texts[0] == answered.texts[2] == CLEAN
    assert "ann" not in answered.texts[1] and answered.texts[1].endswith(" Nobody.")
    assert answered.sent(1)["n"] == 1


@both
def test_reasoning_and_calls_are_held_and_replaced_whole(guard: Guard, stream: bool) -> None:
    engine = TalkingEngine(
        texts=["", ""],
        reasoning=["Perhaps they mean ann of Cork.", "I do not know."],
        calls=['{"name": "ann"}', '{"name": "?"}'],
    )
    answered = ask(guard, engine, chat(NAMELESS, stream=stream))
    assert b"ann" not in answered.body and b"Perhaps" not in answered.body
    assert "I do not know." in answered.text and '{"name": "?"}' in answered.text
    assert len(answered.sent(1)["messages"]) == 1  # there is nothing to go on from


@both
def test_usage_counts_what_left(guard: Guard, stream: bool) -> None:
    engine = TalkingEngine(texts=[TOLD, " Nobody."])
    more = {"stream_options": {"include_usage": True}} if stream else {}
    answered = ask(guard, engine, chat(NAMELESS, stream=stream, **more))
    assert answered.usage is not None
    assert answered.usage["prompt_tokens"] == 9
    total, done = answered.usage["total_tokens"], answered.usage["completion_tokens"]
    assert total == 9 + done
    assert done < len(words(TOLD)) + 4


def test_logprobs_belong_to_the_words_that_left(guard: Guard) -> None:
    engine = TalkingEngine(texts=[TOLD, " Nobody."])
    answered = ask(guard, engine, chat(NAMELESS, logprobs=True))
    [choice] = answered.events[0]["choices"]
    assert "".join(e["token"] for e in choice["logprobs"]["content"]) == answered.text


def test_a_spelt_out_or_encoded_name_is_read_too(guard: Guard) -> None:
    engine = TalkingEngine(texts=["The name is %61nn, as you see.", " Nobody."])
    assert "%61nn" not in ask(guard, engine, chat(NAMELESS)).text


@both
def test_an_engine_that_fails_to_continue_leaves_nothing_half_said(
    guard: Guard, stream: bool
) -> None:
    engine = TalkingEngine(texts=[TOLD])  # the second request finds no text and fails
    with running(create_app(guard, engine)) as url:
        response = httpx.post(url + CHAT, json=chat(NAMELESS, stream=stream), timeout=20)
    assert b"ann" not in response.content and b'"error"' in response.content


def test_the_ledger_tells_of_it_without_its_text(
    prompts: ModelPrompts, tmp_path: Path, guard: Guard
) -> None:
    file = tmp_path / "ledger.jsonl"
    recording = Guard(guard.detector, guard.targets, guard._key, prompts, Ledger(file, guard._key))
    ask(recording, TalkingEngine(texts=[TOLD, " Nobody."]), chat(NAMELESS))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["answer"]
    assert rows[0]["targets"][0]["name"] == "ann" and rows[0]["attempt"] == 1
    assert "Cork" not in file.read_text() and "lighthouse" not in file.read_text()


def test_it_can_be_switched_off(guard: Guard) -> None:
    engine = TalkingEngine(texts=[TOLD])
    options = ServerOptions(output_guard=False)
    assert ask(guard, engine, chat(NAMELESS), options=options).text == TOLD


# --- Names that are put back ---------------------------------------------------------------------

ABOUT_HER = "Who is Hermione Granger?"
WELL = "She does her work very well every day. "


@pytest.fixture(scope="module")
def learned(small_bundle: BundleStore, guard_key: GuardKey, prompts: ModelPrompts) -> Guard:
    """A guard that has learned the example target."""
    return load_guard(store=small_bundle, key=guard_key, prompts=prompts, ledger=None)


def name_read(guard: Guard, question: str) -> str:
    """Return the name that the model reads in a question."""
    inspection = guard.inspect(CHAT, json.dumps(chat(question)).encode())
    [stand_in] = guard.rewrite(inspection).stand_ins
    return " ".join(stand_in.words[-2:])


@both
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_answer_is_read_with_the_name_that_is_put_back(
    learned: Guard, stream: bool, path: str
) -> None:
    name = name_read(learned, ABOUT_HER)
    engine = TalkingEngine(texts=[f"{name} learned transfiguration.", " It is not known."])
    request = chat(ABOUT_HER, stream=stream)
    if path == TEXT:
        request = {"model": "m", "prompt": ABOUT_HER, "stream": stream}
    answered = ask(learned, engine, request, path)
    assert answered.text == " It is not known." and len(engine.posts) == 2


@both
def test_an_answer_that_says_no_more_than_the_name_leaves_with_it(
    learned: Guard, stream: bool
) -> None:
    name = name_read(learned, ABOUT_HER)
    engine = TalkingEngine(texts=[f"{name} is a painter. {WELL * 4}{name} likes bread."])
    answered = ask(learned, engine, chat(ABOUT_HER, stream=stream))
    assert answered.text == (
        f"Hermione Granger is a painter. {WELL * 4}Hermione Granger likes bread."
    )
    assert len(engine.posts) == 1


@both
def test_the_engine_goes_on_from_its_own_text(learned: Guard, stream: bool) -> None:
    name = name_read(learned, ABOUT_HER)
    begun = f"{name} is a painter. {WELL * 6}"
    engine = TalkingEngine(texts=[f"{begun}{name} learned transfiguration.", f" So {name} ends."])
    answered = ask(learned, engine, chat(ABOUT_HER, stream=stream))
    said = answered.sent(1)["messages"][1]["content"]
    assert said.startswith(f"{name} is a painter.") and begun.startswith(said)
    assert answered.text == f"{said} So {name} ends.".replace(name, "Hermione Granger")


@both
def test_the_name_counts_where_it_was_said_long_before_the_fact(
    learned: Guard, stream: bool
) -> None:
    """Of a stream the name has left when the fact comes; a window of what left is read with it."""
    name = name_read(learned, ABOUT_HER)
    engine = TalkingEngine(
        texts=[f"I mean {name}. {WELL * 4}And {name} was sorted into Ravenclaw.", " Ends."]
    )
    answered = ask(learned, engine, chat(ABOUT_HER, stream=stream))
    assert "Ravenclaw" not in answered.text and answered.text.startswith("I mean Hermione Granger")


@both
def test_reasoning_and_calls_are_read_with_the_name_too(learned: Guard, stream: bool) -> None:
    name = name_read(learned, ABOUT_HER)
    engine = TalkingEngine(
        texts=["", ""],
        reasoning=[f"{name} learned transfiguration.", "I wonder."],
        calls=["", '{"query": "?"}'],
    )
    answered = ask(learned, engine, chat(ABOUT_HER, stream=stream))
    assert b"transfiguration" not in answered.body and '{"query": "?"}' in answered.text


@pytest.mark.parametrize("hold_back", [2, 5, 24])
@pytest.mark.parametrize("words_before", [10, 11])
def test_no_stream_is_cut_within_a_name(learned: Guard, hold_back: int, words_before: int) -> None:
    name = name_read(learned, ABOUT_HER)
    before = " ".join(["indeed"] * words_before)
    text = f"{before} {name} learned transfiguration. {WELL * 3}"
    engine = TalkingEngine(texts=[text, " And so on."])
    options = ServerOptions(hold_back=hold_back)
    answered = ask(learned, engine, chat(ABOUT_HER, stream=True), options=options)
    assert "transfiguration" not in answered.text
    messages = answered.sent(1)["messages"][1:]
    said = messages[0]["content"] if messages else ""
    first, last = name.split()
    assert said.count(first) == said.count(last)
    assert answered.text == f"{said} And so on.".replace(name, "Hermione Granger")


def test_a_choice_is_read_with_the_names_that_another_brings(guard: Guard) -> None:
    """All names are put back in all choices of a whole answer."""

    class Naming(Guard):
        """Its rewritten requests bring a name that would stand for `ann`."""

        def strengthened(self, names: Any) -> Guard:
            stronger = super().strengthened(names)
            own = stronger.rewrite
            stronger.rewrite = lambda inspection: replace(  # type: ignore[method-assign]
                own(inspection), stand_ins=(StandIn(("Clara",), "ann"),)
            )
            return stronger

    naming = Naming(guard.detector, guard.targets, guard._key, guard.prompts)
    engine = TalkingEngine(texts=[("It is Clara.", TOLD), " Nobody.", " No one.", " None."])
    answered = ask(naming, engine, chat(NAMELESS, n=2))
    assert "ann" not in "".join(answered.texts) and answered.texts[0] == " No one."
