"""What becomes of a request by its targets' routes: to corrupt, to adapt, both, or to refuse.

The detector flags texts that hold certain words; embeddings are those of the real model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guard.errors import CannotCorruptError, ConfigError
from guard.keys import GuardKey
from guard.pipeline import Guard, Rewritten
from guard.policy import TargetPolicy
from guard.prompts import ModelPrompts
from guard.types import Detection, TargetRoute, TextHit
from tests.guard.routed import (
    ANN,
    BENIGN,
    BOTH,
    FILLED,
    WEIGHTS,
    Filling,
    Names,
    adapter,
    chat,
    filled,
    fillings,
    guard_of,
    policy,
    tool,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ROUTES: tuple[TargetRoute, ...] = ("corrupt", "adapt", "corrupt+adapt", "refuse")


def answered(guard: Guard, body: bytes, endpoint: str = CHAT) -> tuple[str, Rewritten]:
    inspection = guard.inspect(endpoint, body)
    return inspection.decision.route, guard.rewrite(inspection)


# --- One target ----------------------------------------------------------------------------------


def test_corrupt_sends_embeddings_and_no_adapter(prompts: ModelPrompts) -> None:
    route, sent = answered(guard_of(prompts, {"ann": "corrupt"}), chat(ANN))
    assert (route, sent.adapters, filled(sent.body)) == ("corrupt", (), {FILLED["ann"]})


def test_adapt_keeps_every_byte_and_needs_no_model_files() -> None:
    body = b'{"messages" : [ {"role":"user","content":"Where does \\u0061nn live?"} ],"model":"m"}'
    route, sent = answered(guard_of(None, {"ann": "adapt"}), body)
    assert route == "adapt"
    assert sent == Rewritten(body, adapters=(adapter("ann", 0.5),))


def test_both_sends_embeddings_and_the_adapter(prompts: ModelPrompts) -> None:
    route, sent = answered(guard_of(prompts, {"ann": "corrupt+adapt"}), chat(ANN))
    assert route == "corrupt+adapt"
    assert filled(sent.body) == {FILLED["ann"]}
    assert sent.adapters == (adapter("ann", 0.5),)


def test_refuse_is_refused_and_cannot_be_rewritten(prompts: ModelPrompts) -> None:
    guard = guard_of(prompts, {"ann": "refuse"})
    inspection = guard.inspect(CHAT, chat(ANN))
    assert inspection.decision.route == "refuse"
    with pytest.raises(CannotCorruptError, match="refuses"):
        guard.rewrite(inspection)


@pytest.mark.parametrize("route", ROUTES)
def test_a_benign_request_passes_whatever_the_route(prompts: ModelPrompts, route: Any) -> None:
    guard = guard_of(prompts, dict.fromkeys(WEIGHTS, route))
    decision = guard.inspect(CHAT, chat(BENIGN)).decision
    assert (decision.route, decision.targets) == ("pass", ())


@pytest.mark.parametrize("route", ROUTES)
def test_what_was_not_read_whole_is_blocked_whatever_the_route(
    prompts: ModelPrompts, route: Any
) -> None:
    class Blind(Names):
        def detect(self, texts: Sequence[str]) -> Detection:
            found = super().detect(texts)
            return replace(found, coverage=found.coverage * np.float32(0.5))

    policies = guard_of(prompts, dict.fromkeys(WEIGHTS, route)).targets
    guard = Guard(Blind(), policies, GuardKey(bytes(32)), prompts)
    assert guard.inspect(CHAT, chat(ANN)).decision.route == "block"


def test_the_adapter_acts_as_strongly_as_the_strongest_of_several_readings() -> None:
    class Counted(Names):
        def _hits(self, text: str) -> list[TextHit]:
            return [TextHit("ann", 1.0, 0.01, text.count("ann") / 8)] if "ann" in text else []

    guard = Guard(Counted(), {"ann": policy("ann", "adapt")}, GuardKey(bytes(32)))
    body = chat("ann", "ann ann ann")
    (hit,) = guard.inspect(CHAT, body).decision.targets
    _, sent = answered(guard, body)
    assert hit.weight >= 3 / 8
    assert sent.adapters == (adapter("ann", hit.weight),)


# --- Several targets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ann", "bob", "wanted"),
    [
        ("corrupt", "corrupt", "corrupt"),
        ("corrupt", "adapt", "corrupt+adapt"),
        ("adapt", "corrupt", "corrupt+adapt"),
        ("adapt", "adapt", "adapt"),
        ("adapt", "corrupt+adapt", "corrupt+adapt"),
        ("corrupt", "corrupt+adapt", "corrupt+adapt"),
        ("refuse", "adapt", "refuse"),
        ("corrupt", "refuse", "refuse"),
        ("corrupt+adapt", "refuse", "refuse"),
    ],
)
def test_routes_of_two_targets_are_taken_together(
    prompts: ModelPrompts, ann: Any, bob: Any, wanted: str
) -> None:
    guard = guard_of(prompts, {"ann": ann, "bob": bob})
    inspection = guard.inspect(CHAT, chat(BOTH))
    assert inspection.decision.route == wanted
    if wanted == "refuse":
        with pytest.raises(CannotCorruptError):
            guard.rewrite(inspection)
        return
    sent = guard.rewrite(inspection)
    each = {"ann": ann, "bob": bob}
    assert filled(sent.body) == {FILLED[name] for name in each if "corrupt" in each[name]}
    # The surer hit first.
    adapted = [name for name in ("bob", "ann") if "adapt" in each[name]]
    assert sent.adapters == tuple(adapter(name, WEIGHTS[name]) for name in adapted)


def test_detecting_targets_never_act(prompts: ModelPrompts) -> None:
    for route in ROUTES:
        guard = guard_of(prompts, dict.fromkeys(WEIGHTS, route), detecting=tuple(WEIGHTS))
        decision = guard.inspect(CHAT, chat(BOTH)).decision
        assert (decision.flagged, decision.route) == (True, "pass")
    mixed = guard_of(prompts, {"ann": "adapt", "bob": "refuse"}, detecting=["bob"])
    taken, sent = answered(mixed, chat(BOTH))
    assert (taken, sent.adapters) == ("adapt", (adapter("ann", 0.5),))
    corrupting = guard_of(prompts, {"ann": "corrupt", "bob": "corrupt+adapt"}, detecting=["bob"])
    taken, sent = answered(corrupting, chat(BOTH))
    assert (taken, sent.adapters, filled(sent.body)) == ("corrupt", (), {FILLED["ann"]})


# --- Where no embeddings fit ---------------------------------------------------------------------


def test_without_a_place_for_embeddings_corrupt_is_refused(prompts: ModelPrompts) -> None:
    guard = guard_of(prompts, {"ann": "corrupt"})
    inspection = guard.inspect(CHAT, chat(BENIGN, **tool(ANN)))
    assert inspection.decision.route == "refuse"
    with pytest.raises(CannotCorruptError, match="tools/0/function"):
        guard.rewrite(inspection)


@pytest.mark.parametrize("target_route", ["adapt", "corrupt+adapt"])
def test_without_a_place_for_embeddings_the_adapter_acts_alone(
    prompts: ModelPrompts, target_route: Any
) -> None:
    body = chat(BENIGN, **tool(ANN))
    route, sent = answered(guard_of(prompts, {"ann": target_route}), body)
    assert route == "adapt"
    assert sent == Rewritten(body, adapters=(adapter("ann", 0.5),))


def test_a_text_without_a_place_takes_no_corruption_from_the_others(prompts: ModelPrompts) -> None:
    guard = guard_of(prompts, {"ann": "corrupt+adapt"})
    route, sent = answered(guard, chat(ANN, **tool(ANN)))
    assert route == "corrupt+adapt", "a client could switch corruption off by naming her in a tool"
    assert filled(sent.body) == {FILLED["ann"]}
    assert sent.adapters == (adapter("ann", 0.5),)


def test_an_adapter_of_no_weight_is_not_put_on(
    prompts: ModelPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WEIGHTS, "ann", 0.0)  # as O3's code gives to texts below its cut-offs
    _, sent = answered(guard_of(prompts, {"ann": "adapt", "bob": "adapt"}), chat(BOTH))
    assert sent.adapters == (adapter("bob", 1.0),)


def test_one_target_without_a_place_leaves_the_other_its_corruption(prompts: ModelPrompts) -> None:
    guard = guard_of(prompts, {"ann": "corrupt+adapt", "bob": "corrupt"})
    body = chat("Who is bob?", **tool(ANN))
    route, sent = answered(guard, body)
    assert route == "corrupt+adapt"
    assert filled(sent.body) == {FILLED["bob"]}
    assert sent.adapters == (adapter("ann", 0.5),)
    assert json.loads(sent.body)["tools"] == json.loads(body)["tools"]


def test_one_corrupting_target_without_a_place_refuses_beside_an_adapting_one(
    prompts: ModelPrompts,
) -> None:
    guard = guard_of(prompts, {"ann": "corrupt", "bob": "adapt"})
    assert guard.inspect(CHAT, chat("Who is bob?", **tool(ANN))).decision.route == "refuse"


# --- Completions ---------------------------------------------------------------------------------


def prompts_body(*texts: str) -> bytes:
    return json.dumps({"model": "m", "prompt": list(texts)}).encode()


def test_completions_are_adapted_untouched() -> None:
    body = prompts_body(BENIGN, ANN)
    route, sent = answered(guard_of(None, {"ann": "adapt"}), body, COMPLETIONS)
    assert route == "adapt"
    assert sent == Rewritten(body, adapters=(adapter("ann", 0.5),))


def test_completions_are_corrupted_and_adapted(prompts: ModelPrompts) -> None:
    guard = guard_of(prompts, {"ann": "corrupt+adapt", "bob": "adapt"})
    route, sent = answered(guard, prompts_body("Who is bob?", ANN), COMPLETIONS)
    assert route == "corrupt+adapt"
    first, second = json.loads(sent.body)["prompt_embeds"]
    assert (fillings(first), fillings(second)) == (set(), {FILLED["ann"]})
    assert sent.adapters == (adapter("bob", 1.0), adapter("ann", 0.5))


# --- The guard's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["adapt", "corrupt+adapt"])
def test_a_route_that_adapts_needs_an_adapter(route: Any) -> None:
    with pytest.raises(ConfigError, match="needs an adapter"):
        TargetPolicy("enforced", Filling(2.0), route=route)
    assert not TargetPolicy("enforced", Filling(2.0), route="refuse").adapts


def test_only_adapters_that_may_answer_are_made_ready(prompts: ModelPrompts) -> None:
    guard = guard_of(prompts, {"ann": "adapt", "bob": "corrupt", "cid": "corrupt+adapt"})
    assert guard.adapters == (adapter("ann"), adapter("cid"))
    watching = guard_of(prompts, {"ann": "adapt", "cid": "adapt"}, detecting=["ann"])
    assert watching.adapters == (adapter("cid"),)


def test_a_guard_can_be_had_with_one_route_for_all(prompts: ModelPrompts) -> None:
    guard = guard_of(prompts, {"ann": "adapt", "bob": "refuse", "cid": "corrupt"})
    other = guard.routed("corrupt+adapt")
    route, sent = answered(other, chat(BOTH))
    assert route == "corrupt+adapt" and len(sent.adapters) == 2
    assert guard.inspect(CHAT, chat(BOTH)).decision.route == "refuse"
    assert filled(sent.body) == {FILLED["ann"], FILLED["bob"]}
    lone = Guard(Names(), {"ann": TargetPolicy("enforced", Filling(2.0))}, GuardKey(bytes(32)))
    with pytest.raises(ConfigError, match="adapter"):
        lone.routed("adapt")
