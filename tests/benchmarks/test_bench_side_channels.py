"""`bench side-channels`: what is asked, what is looked at, and a classifier that must see."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.report import Row
from benchmarks.run_log import RunLog
from benchmarks.served import served
from benchmarks.side_channels import KINDS, LABELS, ask_all, describe, matched, open_log, plan
from benchmarks.side_channels_rows import AUC, attack, attack_rows, verdict
from guard.cli import run
from guard.prompts import ModelPrompts
from server.engines.embedded.batch import BatchEngine

PAIRS = [(f"plain {n}", f"flagged {n}") for n in range(12)]


def test_pairs_are_names_of_as_many_tokens() -> None:
    pairs = matched(["abcd", "ab", "abcdefgh"], ["xyzw", "xy", "xyz"], len)
    assert pairs == [("xyzw", "abcd"), ("xy", "ab")]


def test_both_names_of_a_pair_are_asked_alike_by_every_arm() -> None:
    asked = plan(["guarded", "unguarded"], PAIRS, 40, 3)
    assert len(asked) == 160 and len({one.id for one in asked}) == 160
    per = Counter((one.arm, one.label, one.kind.streamed) for one in asked)
    assert set(per.values()) == {20}
    shape = {
        (arm, label): Counter(
            (one.pair, one.kind.name, one.text.replace(f"{label} {one.pair}", "{}"))
            for one in asked
            if (one.arm, one.label) == (arm, label)
        )
        for arm in ("guarded", "unguarded")
        for label in LABELS
    }
    assert len({str(sorted(counts.items())) for counts in shape.values()}) == 1
    assert asked == plan(["guarded", "unguarded"], PAIRS, 40, 3)


def body(**more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"content": "some text"}, "finish_reason": "stop"}
    return {"id": "x1", "model": "m", "choices": [choice], **more}


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        (lambda b: b.update(extra=1), "/extra:int"),
        (lambda b: b.update(model="n"), "model n"),
        (lambda b: b.update(id="x12"), "length of the id"),
        (lambda b: b["choices"][0].update(finish_reason="length"), "finish length"),
        (lambda b: b["usage"].update(completion_tokens=8), "completion"),
        (lambda b: b["usage"].update(prompt_tokens=8), "prompt"),
    ],
)
def test_what_a_client_could_see_is_a_feature(change: Any, feature: str) -> None:
    headers = {"content-type": "application/json"}
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    before = describe(200, headers, json.dumps(body(usage=dict(usage))).encode(), 5)
    changed = body(usage=dict(usage))
    change(changed)
    after = describe(200, headers, json.dumps(changed).encode(), 5)
    assert feature in {name for name in {*before, *after} if before.get(name) != after.get(name)}


def test_text_is_no_feature_but_an_empty_event_is() -> None:
    headers = {"content-type": "text/event-stream"}

    def seen(*texts: str) -> dict[str, float]:
        events = [{"choices": [{"delta": {"content": t}, "finish_reason": None}]} for t in texts]
        lines = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in events)
        return describe(200, headers, lines + b"data: [DONE]\n\n", 5)

    assert seen("He", "llo") == seen("Good", " day")
    assert seen("", "Hello")["empty events"] == 1.0 and seen("a", "")["first empty"] == 1.0


def planted(chance: float, pairs: int = 16) -> tuple[list[dict[str, float]], list[int], list[int]]:
    """Answers of which one feature is noise, and another tells with a chance."""
    rng = np.random.default_rng(0)
    labels = [number % 2 for number in range(pairs * 8)]
    told = rng.random(len(labels)) < chance
    features = [
        {"noise": float(rng.normal()), "told": float(label and bool(t))}
        for label, t in zip(labels, told, strict=True)
    ]
    return features, labels, [number // 8 for number in range(pairs * 8)]


def test_the_attack_finds_a_difference_that_is_there() -> None:
    found = attack(*planted(0.5), seed=0)
    assert found.auc > 0.65 and found.low > 0.55
    assert found.best[0][0] == "told" and found.low <= found.auc <= found.high


def test_the_attack_finds_none_where_there_is_none() -> None:
    found = attack(*planted(0.0), seed=0)
    assert found.low < 0.5 < found.high


def test_what_only_a_name_tells_does_not_help_with_other_names() -> None:
    """Each name has a number of its own: learned by heart it would tell, held out it must not."""
    _, labels, pairs = planted(0.0)
    rng = np.random.default_rng(1)
    own = rng.normal(size=(16, 2))
    features = [{"own": float(own[p, label])} for p, label in zip(pairs, labels, strict=True)]
    assert attack(features, labels, pairs, seed=0).low < 0.55


def test_verdicts_are_of_the_servers_with_a_guard() -> None:
    rows = [
        Row("guarded", "metadata", AUC, "all", 0.5, 0.4, 0.6, 9),
        Row("guarded", "metadata and timing", AUC, "all", 0.9, 0.8, 1.0, 9),
        Row("equalised", "metadata and timing", AUC, "all", 0.7, 0.6, 0.8, 9),
        Row("unguarded", "metadata", AUC, "all", 0.9, 0.8, 1.0, 9),
    ]
    assert [line.split(":")[0] for line in verdict(rows)] == ["met", "MISSED"]


def test_a_server_is_asked_once_for_each(
    tmp_path: Path, smollm2_dir: Path, prompts: ModelPrompts
) -> None:
    asked = plan(["unguarded"], PAIRS[:6], 6, 0)
    log = open_log(tmp_path, {"run": 1}, restart=False)
    with served(BatchEngine(smollm2_dir, "m", threads=2), None, "m") as endpoint:
        ask_all(asked, {"unguarded": str(endpoint.client.base_url)}, prompts, 2, log, quiet)
    assert set(log.records) == {one.id for one in asked}
    for record in log.records.values():
        assert record["metadata"]["status"] == 200 and record["metadata"]["prompt"] == 0
        assert record["metadata"]["completion"] == 2
        assert 0 < record["timing"]["until headers"] <= record["timing"]["total"]
    kept = (tmp_path / "seen.jsonl").read_text()
    assert "plain" in kept and "Who is" not in kept
    rows, best = attack_rows(asked, RunLog(tmp_path / "seen.jsonl", _run(kept)).records, 0)
    assert {row.group for row in rows} >= {"all", "whole", "streamed"}
    assert {row.route for row in rows} == {"metadata", "metadata and timing"} and best
    [metadata] = [r for r in rows if (r.route, r.group) == ("metadata", "all")]
    assert metadata.n == 12


def _run(kept: str) -> str:
    return str(json.loads(kept.splitlines()[0])["run"])


def quiet(what: str, done: int, total: int) -> None:
    """Show nothing."""


def test_every_kind_is_a_request_of_its_own() -> None:
    bodies = [kind.body("m", "Who?", 4) for kind in KINDS]
    assert len({json.dumps(one, sort_keys=True) for one in bodies}) == len(KINDS)
    assert all(("prompt" in b) != kind.chat for b, kind in zip(bodies, KINDS, strict=True))


def test_nobody_to_ask_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet_surroundings: None
) -> None:
    assert run(["bench", "side-channels", "--out", str(tmp_path)]) == 2
    assert "nobody to ask" in " ".join(capsys.readouterr().err.split())


def test_a_server_that_is_gone_is_said(tmp_path: Path, prompts: ModelPrompts) -> None:
    from guard.errors import EngineUnavailableError

    asked = plan(["guarded"], PAIRS, 20, 0)
    log = open_log(tmp_path, {}, restart=False)
    with httpx.Client(), pytest.raises(EngineUnavailableError, match="the same command goes on"):
        ask_all(asked, {"guarded": "http://127.0.0.1:9"}, prompts, 2, log, quiet)
