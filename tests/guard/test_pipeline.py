"""The guard decides on all that a model would read, and rewrites only what was flagged.

What it makes of a whole request is tested with a detector that flags texts holding certain words;
the rest with the real one.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.embeds import decode_embeds
from guard.errors import ArtifactError, CannotCorruptError, IncompatibleArtifactError, StageError
from guard.keys import GuardKey
from guard.ledger import Ledger, verify_ledger
from guard.pipeline import Guard, Inspection
from guard.policy import TargetPolicy
from guard.prompts import ModelPrompts
from guard.request import parse_request
from guard.types import BoolArray, Decision, Detection, FloatArray, TextHit

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
FLAGGED = "Which house was Hermione Granger sorted into at Hogwarts?"
BENIGN = "How do I bake bread at home?"
MAX_BYTES = 10_000_000


@pytest.fixture(scope="module")
def ledger_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger") / "ledger.jsonl"


@pytest.fixture(scope="module")
def guard(
    small_bundle: BundleStore, guard_key: GuardKey, prompts: ModelPrompts, ledger_path: Path
) -> Guard:
    ledger = Ledger(ledger_path, guard_key)
    return load_guard(store=small_bundle, key=guard_key, prompts=prompts, ledger=ledger)


def chat(*contents: Any, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def embeddings_of(part: str) -> FloatArray:
    return decode_embeds(base64.b64decode(part), MAX_BYTES)


def rewritten(guard: Guard, endpoint: str, body: bytes) -> dict[str, Any]:
    inspection = guard.inspect(endpoint, body)
    assert inspection.decision.route == "corrupt"
    found: dict[str, Any] = json.loads(guard.rewrite(inspection).body)
    return found


def test_only_the_flagged_message_is_flagged_and_its_entity_named(guard: Guard) -> None:
    decision = guard.inspect(CHAT, chat(BENIGN, FLAGGED)).decision
    assert (decision.flagged, decision.route, decision.coverage) == (True, "corrupt", 1.0)
    (hit,) = decision.targets
    assert hit.name == "harry-potter" and hit.enforced and 0 < hit.p_value < 0.01
    assert {span.path for span in hit.spans} == {"messages/1/content"}
    named = " ".join(FLAGGED[span.start : span.end] for span in hit.spans)
    assert "Hogwarts" in named and "Hermione" in named


def test_a_benign_request_passes(guard: Guard) -> None:
    decision = guard.inspect(CHAT, chat(BENIGN)).decision
    assert (decision.flagged, decision.route, decision.targets) == (False, "pass", ())


def test_spans_point_into_the_text_as_it_was_sent(guard: Guard) -> None:
    disguised = "Which house was Her\u200bmione Granger sorted into at Ｈｏｇｗａｒｔｓ?"
    decision = guard.inspect(CHAT, chat(disguised)).decision
    named = [disguised[span.start : span.end] for span in decision.targets[0].spans]
    assert any("Ｈｏｇｗａｒｔｓ" in text for text in named)


def test_names_are_replaced_their_sentence_is_blurred_and_other_tokens_stay_clean(
    guard: Guard, prompts: ModelPrompts
) -> None:
    text = f"{BENIGN} {FLAGGED} Thank you."
    inspection = guard.inspect(CHAT, chat(text))
    rewritten = guard.rewrite(inspection)
    sent = embeddings_of(json.loads(rewritten.body)["messages"][0]["content"][0]["data"])
    tokens = prompts.content_tokens([{"role": "user", "content": text}], 0)
    moved = np.sqrt(np.mean((sent - prompts.embed(tokens.ids)) ** 2, axis=1))
    spans = inspection.decision.targets[0].spans
    flagged = range(len(BENIGN) + 1, len(BENIGN) + len(FLAGGED))  # not the final mark
    for way, (start, end) in zip(moved, tokens.offsets, strict=True):
        marked = any(start < span.end and span.start < end for span in spans)
        if marked:
            assert way > 0
        else:
            assert (0 < way < prompts.embedding_rms) == (end - 1 in flagged)
    assert {name.asked for name in rewritten.stand_ins} == {"Hermione Granger", "Hogwarts"}


def test_the_same_text_gets_the_same_noise_and_another_text_other_noise(guard: Guard) -> None:
    once, again = (rewritten(guard, CHAT, chat(FLAGGED)) for _ in range(2))
    assert once == again
    other = rewritten(guard, CHAT, chat("Please tell me: " + FLAGGED))
    assert once != other


def test_everything_else_of_the_body_stays(guard: Guard) -> None:
    fields = {"temperature": 0.5, "stop": ["\n\n"], "seed": 7, "n": 2}
    sent = rewritten(guard, CHAT, chat(BENIGN, FLAGGED, **fields))
    assert {key: sent[key] for key in fields} == fields
    assert sent["messages"][0] == {"role": "user", "content": BENIGN}


def test_a_flagged_answer_gets_a_penalty_unless_the_client_set_one(guard: Guard) -> None:
    assert rewritten(guard, CHAT, chat(FLAGGED))["frequency_penalty"] > 0
    own = rewritten(guard, CHAT, chat(FLAGGED, presence_penalty=0.0))
    assert own["presence_penalty"] == 0.0 and "frequency_penalty" not in own
    mixed = json.dumps({"model": "m", "prompt": [BENIGN, FLAGGED]}).encode()
    assert "frequency_penalty" not in rewritten(guard, COMPLETIONS, mixed)


def test_parts_of_one_message_become_one_embeddings_part(
    guard: Guard, prompts: ModelPrompts
) -> None:
    parts = [{"type": "text", "text": text} for text in (BENIGN, "", FLAGGED)]
    inspection = guard.inspect(CHAT, chat(parts))
    assert {span.path for span in inspection.decision.targets[0].spans} == {
        "messages/0/content/2/text"
    }
    content = json.loads(guard.rewrite(inspection).body)["messages"][0]["content"]
    assert [part["type"] for part in content] == ["prompt_embeds"]
    sent = embeddings_of(content[0]["data"])
    tokens = prompts.content_tokens([{"role": "user", "content": parts}], 0)
    clean = prompts.embed(tokens.ids)
    changed = [row for row in range(len(clean)) if not np.array_equal(clean[row], sent[row])]
    assert changed and min(tokens.offsets[row][0] for row in changed) > len(BENIGN)


def test_completions_prompts_become_embeddings(guard: Guard, prompts: ModelPrompts) -> None:
    body = json.dumps({"model": "m", "prompt": FLAGGED, "max_tokens": 5}).encode()
    sent = rewritten(guard, COMPLETIONS, body)
    assert "prompt" not in sent and sent["max_tokens"] == 5
    assert len(embeddings_of(sent["prompt_embeds"])) == len(prompts.prompt_tokens(FLAGGED).ids)


def test_token_id_prompts_are_read_and_unflagged_neighbours_sent_clean(
    guard: Guard, prompts: ModelPrompts
) -> None:
    flagged, benign = (prompts.prompt_tokens(text).ids for text in (FLAGGED, BENIGN))
    body = json.dumps({"model": "m", "prompt": [benign, flagged]}).encode()
    first, second = (
        embeddings_of(part) for part in rewritten(guard, COMPLETIONS, body)["prompt_embeds"]
    )
    assert np.array_equal(first, prompts.embed(benign))
    assert not np.array_equal(second, prompts.embed(flagged))


def test_an_empty_prompt_beside_a_flagged_one_is_refused_clearly(guard: Guard) -> None:
    body = json.dumps({"model": "m", "prompt": ["", FLAGGED]}).encode()
    with pytest.raises(CannotCorruptError, match="no tokens"):
        guard.rewrite(guard.inspect(COMPLETIONS, body))


def test_text_outside_contents_is_refused_not_passed(guard: Guard) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": FLAGGED}}
    inspection = guard.inspect(CHAT, chat(BENIGN, tools=[tool]))
    assert inspection.decision.route == "refuse"
    with pytest.raises(CannotCorruptError, match="tools/0/function"):
        guard.rewrite(inspection)


def test_detecting_targets_are_recorded_and_never_acted_on(guard: Guard) -> None:
    policies = {name: replace(p, status="detecting") for name, p in guard.targets.items()}
    watching = Guard(guard.detector, policies, GuardKey.generate(), guard.prompts)
    decision = watching.inspect(CHAT, chat(FLAGGED)).decision
    assert decision.flagged and decision.route == "pass"
    assert [hit.enforced for hit in decision.targets] == [False]


def test_a_failing_detector_is_a_stage_error(guard: Guard) -> None:
    class Broken:
        targets = guard.detector.targets

        def detect(self, texts: object) -> Any:
            raise OSError("gone")

        def spans(self, text: str, target: str) -> list[tuple[int, int]]:
            return []

    broken = Guard(Broken(), guard.targets, GuardKey.generate(), guard.prompts)
    with pytest.raises(StageError, match="detect"):
        broken.inspect(CHAT, chat(BENIGN))


def test_what_was_not_read_whole_is_never_passed(guard: Guard) -> None:
    class HalfBlind:
        targets = guard.detector.targets

        def detect(self, texts: list[str]) -> Any:
            found = guard.detector.detect(texts)
            return replace(found, coverage=found.coverage * np.float32(0.5))

        def spans(self, text: str, target: str) -> list[tuple[int, int]]:
            return []

    blind = Guard(HalfBlind(), guard.targets, GuardKey.generate(), guard.prompts)
    assert blind.inspect(CHAT, chat(BENIGN)).decision.route == "block"


def test_the_ledger_has_figures_and_no_text(
    guard: Guard, guard_key: GuardKey, ledger_path: Path
) -> None:
    for body in (chat(BENIGN), chat(FLAGGED)):
        guard.record(guard.inspect(CHAT, body))
    rows = [json.loads(line) for line in ledger_path.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["decision"]
    assert rows[0]["route"] == "corrupt" and rows[0]["targets"][0]["name"] == "harry-potter"
    assert "Hermione" not in ledger_path.read_text()
    assert verify_ledger(ledger_path, guard_key).ok


def test_many_requests_at_once_are_decided_as_one_by_one(guard: Guard) -> None:
    bodies = [chat(text) for text in (BENIGN, FLAGGED, "2 + 2?", FLAGGED, "Who is Ron Weasley?")]
    requests = [parse_request(CHAT, body) for body in bodies]
    assert guard.decide_many(requests) == [guard.decide(request) for request in requests]


def test_long_text_is_read_to_its_end(guard: Guard) -> None:
    long = " ".join([BENIGN] * 400) + " " + FLAGGED
    decision = guard.inspect(CHAT, chat(long)).decision
    assert decision.coverage == 1.0 and decision.flagged
    assert max(span.end for span in decision.targets[0].spans) > len(long) - len(FLAGGED)


def test_a_bundle_is_refused_for_another_key_model_or_bytes(
    small_bundle: BundleStore, guard_key: GuardKey, prompts: ModelPrompts, tmp_path: Path
) -> None:
    def load(store: BundleStore, key: GuardKey) -> Guard:
        return load_guard(store=store, key=key, prompts=prompts, ledger=None)

    with pytest.raises(IncompatibleArtifactError, match="key"):
        load(BundleStore(small_bundle.root), GuardKey.generate())
    copied = BundleStore(tmp_path / "copy", guard_key)
    shutil.copytree(small_bundle.root, copied.root)
    head = next(copied.root.rglob("head.safetensors"))
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="altered"):
        load(copied, guard_key)


def test_inspections_do_not_share_state(guard: Guard) -> None:
    first, second = guard.inspect(CHAT, chat(FLAGGED)), guard.inspect(CHAT, chat(BENIGN))
    assert isinstance(first, Inspection) and first.request.body != second.request.body
    assert guard.rewrite(first) == guard.rewrite(first)


# --- The whole view ------------------------------------------------------------------------------


class WordDetector:
    """Flags texts that hold all words of a target; its names, if any, are what the finder finds."""

    def __init__(self, words: Mapping[str, Sequence[str]], names: Sequence[str] = ()) -> None:
        self._words, self._names = words, names
        self.seen: list[str] = []

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self._words)

    def detect(self, texts: Sequence[str]) -> Detection:
        self.seen = list(texts)
        hits = tuple(tuple(self._hits(text.lower())) for text in texts)
        margins = [max((hit.score for hit in some), default=-3.0) for some in hits]
        ones = np.ones(len(texts), np.float32)
        return Detection(hits, np.array(margins, np.float32), ones)

    def spans(self, text: str, target: str) -> list[tuple[int, int]]:
        found = (re.finditer(name, text, re.IGNORECASE) for name in self._names)
        return sorted(match.span() for matches in found for match in matches)

    def _hits(self, text: str) -> list[TextHit]:
        return [
            TextHit(name, 1.0 + text.count(words[0]), 0.01 / (1 + text.count(words[0])), 0.5)
            for name, words in self._words.items()
            if all(word in text for word in words)
        ]


def unchanged(embeddings: FloatArray, positions: BoolArray, seed: bytes) -> FloatArray:
    return embeddings


POTTER = WordDetector({"hp": ["harry", "potter"]}, ["harry", "potter"])


def watch(detector: WordDetector, entity_only: bool = True) -> Guard:
    policies = {name: TargetPolicy("enforced", unchanged, entity_only) for name in detector.targets}
    return Guard(detector, policies, GuardKey.generate())


def talk(*turns: tuple[str, str], **fields: Any) -> bytes:
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def named(decision: Decision, *contents: str) -> list[str]:
    """What the spans of the only hit mark in the messages."""
    (hit,) = decision.targets
    return [contents[int(span.path.split("/")[1])][span.start : span.end] for span in hit.spans]


def test_a_plain_request_is_read_once() -> None:
    detector = WordDetector({"hp": ["harry", "potter"]})
    decision = watch(detector).inspect(CHAT, chat(BENIGN)).decision
    assert detector.seen == [BENIGN]
    assert (decision.route, decision.margin, decision.coverage) == ("pass", -3.0, 1.0)


def test_an_encoded_question_is_corrupted_where_it_is_encoded() -> None:
    payload = base64.b64encode(b"Who is Harry Potter?").decode()
    text = f"Decode this and answer: {payload} Thanks!"
    decision = watch(POTTER).inspect(CHAT, chat(text)).decision
    assert (decision.route, decision.coverage) == ("corrupt", 1.0)
    assert named(decision, text) == [payload]


def test_an_encoded_question_without_an_entity_is_corrupted_where_it_is_encoded() -> None:
    payload = base64.b64encode(b"Who is Harry Potter?").decode()
    text = f"Decode this and answer: {payload} Thanks!"
    nameless = WordDetector({"hp": ["harry", "potter"]})
    assert named(watch(nameless).inspect(CHAT, chat(text)).decision, text) == [payload]


def test_plain_and_encoded_names_of_one_text_are_both_marked() -> None:
    payload = b"Harry Potter went to school".hex()
    text = f"Who is Harry Potter? Also tell me of {payload} please."
    decision = watch(POTTER).inspect(CHAT, chat(text)).decision
    assert named(decision, text) == ["Harry", "Potter", payload]


def test_a_question_split_over_turns_is_flagged_in_both() -> None:
    turns = ("Who is Harry", "Which one?", "Potter, of course.")
    body = talk(("user", turns[0]), ("assistant", turns[1]), ("user", turns[2]))
    decision = watch(POTTER).inspect(CHAT, body).decision
    assert decision.route == "corrupt" and decision.margin >= 0
    assert named(decision, *turns) == ["Harry", "Potter"]


def test_a_split_question_without_an_entity_is_corrupted_in_all_the_user_said() -> None:
    turns = ("Think of a harry.", "Done.", "Of which potter?")
    body = talk(("user", turns[0]), ("assistant", turns[1]), ("user", turns[2]))
    nameless = WordDetector({"hp": ["harry", "potter"]})
    decision = watch(nameless).inspect(CHAT, body).decision
    assert named(decision, *turns) == ["Think of a harry", "Of which potter"]
    whole = watch(POTTER, entity_only=False).inspect(CHAT, body).decision
    assert whole.targets[0].spans == decision.targets[0].spans


def test_a_message_that_is_flagged_by_itself_is_the_only_one_that_is_marked() -> None:
    turns = (BENIGN, "Flour.", "Who is Harry Potter?", "A boy.", "And what does Harry eat?")
    roles = ("user", "assistant", "user", "assistant", "user")
    decision = watch(POTTER).inspect(CHAT, talk(*zip(roles, turns, strict=True))).decision
    assert named(decision, *turns) == ["Harry", "Potter"]
    assert {span.path for span in decision.targets[0].spans} == {"messages/2/content"}


def test_two_split_questions_far_apart_are_both_marked() -> None:
    turns = ["Tell me of Harry", "and of Potter.", *[BENIGN] * 14, "Again: Harry", "Potter!"]
    decision = watch(POTTER).inspect(CHAT, talk(*(("user", turn) for turn in turns))).decision
    paths = [span.path for span in decision.targets[0].spans]
    assert {"messages/0/content", "messages/1/content"} <= set(paths)
    assert len(paths) == len(set(paths))


def test_a_benign_conversation_is_not_flagged_by_being_joined() -> None:
    turns = ("What is bread?", "Food.", "Who bakes it?", "A baker.", "Where can I buy it?")
    roles = ("user", "assistant", "user", "assistant", "user")
    decision = watch(POTTER).inspect(CHAT, talk(*zip(roles, turns, strict=True))).decision
    assert (decision.flagged, decision.route, decision.coverage) == (False, "pass", 1.0)


def test_the_best_reading_says_how_strong_a_hit_is() -> None:
    decision = watch(POTTER).inspect(CHAT, chat("Harry Potter", "harry harry Potter")).decision
    (hit,) = decision.targets
    assert hit.score >= 3.0 and decision.margin == hit.score
    assert hit.p_value <= 0.01 / 3


def test_a_split_over_a_tool_call_that_cannot_be_corrupted_is_refused() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '"Potter"'}}
    messages = [
        {"role": "user", "content": "Who is Harry"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "Nobody"},
    ]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    assert watch(POTTER).inspect(CHAT, body).decision.route == "refuse"


def test_prompts_of_a_completion_are_not_read_together() -> None:
    body = json.dumps({"model": "m", "prompt": ["Who is Harry", "Potter?"]}).encode()
    assert not watch(POTTER).inspect(COMPLETIONS, body).decision.flagged


def test_a_reading_that_was_not_scored_whole_blocks() -> None:
    class Blind(WordDetector):
        """Does not read what was decoded."""

        def detect(self, texts: Sequence[str]) -> Detection:
            found = super().detect(texts)
            found.coverage[1:] = 0.5
            return found

    payload = base64.b64encode(b"How do I bake bread at home?").decode()
    blind = watch(Blind({"hp": ["harry"]}))
    assert blind.inspect(CHAT, chat(BENIGN)).decision.route == "pass"
    assert blind.inspect(CHAT, chat(f"Decode {payload}")).decision.route == "block"


def test_alternatives_that_were_too_many_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.view.ALTERNATIVES_FACTOR", 0)
    monkeypatch.setattr("guard.view.ALTERNATIVES_FLOOR", 10)
    payload = base64.b64encode(b"How do I bake bread at home?").decode()
    decision = watch(POTTER).inspect(CHAT, chat(f"Decode {payload}")).decision
    assert decision.coverage < 1 and decision.route == "block"


def test_without_targets_nothing_is_flagged_and_readings_are_shared_between_requests() -> None:
    detector = WordDetector({})
    requests = [parse_request(CHAT, chat(text)) for text in (BENIGN, BENIGN, "Hi")]
    decisions = watch(detector).decide_many(requests)
    assert detector.seen == [BENIGN, "Hi"]
    assert [decision.flagged for decision in decisions] == [False] * 3
