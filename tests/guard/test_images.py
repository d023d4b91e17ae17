"""Images: refused, or with `images: pass` sent on beside texts that are judged as ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from guard.decide import decide_lines
from guard.errors import CannotCorruptError, RequestError
from guard.keys import GuardKey
from guard.pipeline import Guard, Rewritten
from guard.policy import TargetPolicy
from guard.prompts import ModelPrompts
from guard.request import ImagePolicy, parse_request
from guard.types import TargetRoute, TextHit
from tests.guard.routed import ANN, BENIGN, BOTH, WEIGHTS, Names, adapter, policy

CHAT = "/v1/chat/completions"
PNG = "data:image/png;base64,iVBORw0KGgo="


def image(url: str = PNG, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def asked(text: str | None, part: dict[str, Any] | None = None, role: str = "user") -> bytes:
    words = [] if text is None else [{"type": "text", "text": text}]
    messages = [{"role": role, "content": [part or image(), *words]}]
    return json.dumps({"model": "m", "messages": messages}).encode()


def guard_of(
    route: TargetRoute,
    prompts: ModelPrompts | None = None,
    detector: Names | None = None,
    **changed: TargetPolicy,
) -> Guard:
    policies = {name: policy(name, route) for name in WEIGHTS} | changed
    key = GuardKey(bytes(32))
    return Guard(detector or Names(), policies, key, prompts, images="pass")


# --- What is accepted ----------------------------------------------------------------------------


def test_they_are_refused_unless_the_operator_says_otherwise() -> None:
    for images in ((), ("deny",)):
        with pytest.raises(RequestError) as caught:
            parse_request(CHAT, asked(BENIGN), *images)
        assert caught.value.code == "unsupported_content"
        assert caught.value.param == "messages[0].content[0].type"


def test_texts_beside_them_are_read_and_the_bytes_kept() -> None:
    body = asked("look", image(detail="low"))
    request = parse_request(CHAT, body, "pass")
    assert request.has_images and request.body == body
    (segment,) = request.segments()
    assert (segment.path, segment.text) == ("messages/0/content/1/text", "look")
    assert not parse_request(
        CHAT, b'{"model":"m","messages":[{"role":"user","content":"x"}]}', "pass"
    ).has_images


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.png",
        "file:///etc/passwd",
        "data:text/plain;base64,aGk=",
        "data:image/svg+xml;base64,aGk=",
        "data:image/png,words%20to%20read",
        "data:image/png;base64,not base64",
        f"{PNG}\n",
        "",
    ],
)
def test_nothing_is_fetched_for_a_client_and_no_image_is_text(url: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(CHAT, asked(BENIGN, image(url)), "pass")
    assert caught.value.code == "unsupported_content"
    assert caught.value.param == "messages[0].content[0].image_url.url"
    assert "base64" in str(caught.value)


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
def test_only_users_show_images(role: str) -> None:
    with pytest.raises(RequestError, match="user's messages only"):
        parse_request(CHAT, asked(BENIGN, role=role), "pass")


def misshapen() -> Iterator[dict[str, Any]]:
    yield {"type": "image_url"}
    yield {"type": "image_url", "image_url": PNG}
    yield {"type": "image_url", "image_url": {}}
    yield {"type": "image_url", "image_url": {"url": 1}}
    yield {"type": "image_url", "image_url": {"url": PNG, "more": "ann"}}
    yield {"type": "image_url", "image_url": {"url": PNG, "detail": "ann"}}
    yield {**image(), "uuid": "u"}
    yield {**image(), "text": "ann"}
    for kind in ("input_audio", "file", "video_url", "image_embeds", "image_pil", "prompt_embeds"):
        yield {"type": kind, kind: {"url": PNG}}


@pytest.mark.parametrize("part", list(misshapen()))
def test_all_other_parts_and_keys_are_refused_still(part: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        parse_request(CHAT, asked(BENIGN, part), "pass")


@pytest.mark.parametrize(("images", "key"), [("pass", "route"), ("deny", "error")])
def test_decide_answers_as_the_server_does(images: ImagePolicy, key: str) -> None:
    line = b'{"messages": %s}' % json.dumps(json.loads(asked(ANN))["messages"]).encode()
    (row,) = decide_lines(guard_of("corrupt"), [line], None, images)
    assert key in row


# --- What becomes of it --------------------------------------------------------------------------


def rewritten(guard: Guard, body: bytes) -> Rewritten:
    inspection = guard.inspect(CHAT, body)
    assert inspection.decision.flagged
    return guard.rewrite(inspection)


def test_an_image_does_not_keep_texts_from_being_judged() -> None:
    guard = guard_of("corrupt")
    assert guard.inspect(CHAT, asked(BENIGN)).decision.route == "pass"
    assert guard.inspect(CHAT, asked(None)).decision.route == "pass"
    assert guard.inspect(CHAT, asked(ANN)).decision.route == "corrupt"


def test_where_embeddings_would_stand_beside_images_the_request_is_refused(
    prompts: ModelPrompts,
) -> None:
    with pytest.raises(CannotCorruptError):
        rewritten(guard_of("corrupt", prompts), asked(ANN))
    earlier = json.loads(asked(BENIGN))
    earlier["messages"].append({"role": "user", "content": ANN})
    with pytest.raises(CannotCorruptError):
        rewritten(guard_of("corrupt", prompts), json.dumps(earlier).encode())


@pytest.mark.parametrize("route", ["adapt", "corrupt+adapt"])
def test_adapters_answer_alone_and_the_image_stays(route: TargetRoute) -> None:
    body = asked(ANN)
    assert rewritten(guard_of(route), body) == Rewritten(body, adapters=(adapter("ann", 0.5),))
    steered = json.loads(body) | {"min_tokens": 9}
    sent = rewritten(guard_of(route), json.dumps(steered).encode())
    assert json.loads(sent.body) == json.loads(body)


def test_each_target_needs_an_adapter_that_acts() -> None:
    class Weightless(Names):
        def _hits(self, text: str) -> list[TextHit]:
            return [replace(hit, weight=0.0) for hit in super()._hits(text)]

    mixed = guard_of("corrupt+adapt", bob=policy("bob", "corrupt"))
    assert rewritten(mixed, asked(ANN)).adapters
    for guard in (mixed, guard_of("corrupt+adapt", detector=Weightless())):
        with pytest.raises(CannotCorruptError):
            rewritten(guard, asked(BOTH))


def test_a_target_that_is_only_recorded_decides_nothing() -> None:
    guard = guard_of("corrupt", ann=replace(policy("ann", "corrupt"), status="detecting"))
    decision = guard.inspect(CHAT, asked(ANN)).decision
    assert (decision.flagged, decision.route) == (True, "pass")
