"""The leak benchmark: probes in, two servers asked over HTTP, figures and exit codes out.

The servers say what the test gives them, so that every leak and fault is known beforehand.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.leak import main
from benchmarks.leak_report import failures, measure_leak, spread_out
from benchmarks.probes import Probe, mark_known, read_probes, write_probes
from guard.errors import DataError

PROBES = [
    {"id": "a", "question": "Who wrote it?", "facts": ["Rowling"], "kind": "direct"},
    {"id": "b", "question": "Where do they study?", "facts": ["Hogwarts"], "kind": "direct"},
    {"id": "c", "question": "Which game is it?", "facts": ["Quidditch"], "kind": "keyword"},
]
KNOWING = {
    "Who wrote it?": "J.K. Rowling did.",
    "Where do they study?": "At Hogwarts, I think.",
    "Which game is it?": "Some kind of polo.",
}
FORGETFUL = {
    "Who wrote it?": "A writer from Bristol.",
    "Where do they study?": "In a school of the town.",
    "Which game is it?": "Some kind of polo.",
}


def answering(answers: dict[str, str], faults: int = 0) -> Starlette:
    """An endpoint that gives `answers`, after `faults` refusals for a full queue."""
    left = [faults]

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def chat(request: Request) -> Response:
        if left[0]:
            left[0] -= 1
            return JSONResponse({"error": {"message": "busy"}}, 429, {"retry-after-ms": "1"})
        body = await request.json()
        assert body["temperature"] == 0
        text = answers.get(body["messages"][0]["content"], "Something else.")
        if not body.get("stream"):
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": text}
            return JSONResponse({"id": "1", "object": "chat.completion", "choices": [choice]})

        async def events() -> Any:
            for piece in (text[:5], text[5:]):
                chunk = {"id": "1", "choices": [{"index": 0, "delta": {"content": piece}}]}
                yield f"data: {json.dumps(chunk)}\n\n"
            yield 'data: {"id": "1", "choices": []}\n\ndata: [DONE]\n\n'

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(
        routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    )


Serve = Callable[[Starlette], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(app: Starlette) -> str:
            bound = stack.enter_context(socket.socket())
            bound.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
            thread = Thread(target=server.run, args=([bound],), daemon=True)
            thread.start()
            while not server.started:
                time.sleep(0.01)
            stack.callback(thread.join, 10)
            stack.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{bound.getsockname()[1]}"

        yield start


@pytest.fixture
def probes_file(tmp_path: Path) -> Path:
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBES))
    return path


def known_ids(path: Path) -> list[str]:
    return [probe.id for probe in read_probes(path) if probe.known]


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_mark_then_measure(
    serve: Serve, probes_file: Path, tmp_path: Path, stream: list[str]
) -> None:
    guarded, unguarded = serve(answering(FORGETFUL)), serve(answering(KNOWING, faults=2))
    assert main(["--url", unguarded, "--probes", str(probes_file), "--mark", *stream]) == 0
    assert known_ids(probes_file) == ["a", "b"]
    out = tmp_path / "out.json"
    arguments = ["--url", guarded, "--unguarded-url", unguarded, "--probes", str(probes_file)]
    assert main([*arguments, "--json", str(out), "--check", "--concurrency", "2", *stream]) == 0
    report = json.loads(out.read_text())
    assert report["stream"] is bool(stream)
    assert (report["leak"]["leak"]["count"], report["leak"]["leak"]["total"]) == (0, 2)
    assert report["leak"]["unguarded_known"]["count"] == 2
    assert [row["unguarded_fact"] for row in report["leak"]["rows"]] == ["Rowling", "Hogwarts"]
    assert report["leak"]["rows"][0]["answer"] == FORGETFUL["Who wrote it?"]


def test_a_guard_that_leaks_fails_the_check(
    serve: Serve, probes_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(answering(KNOWING))
    assert main(["--url", url + "/v1/", "--probes", str(probes_file), "--all", "--check"]) == 1
    output = capsys.readouterr()
    assert "leak a [Rowling]: J.K. Rowling did." in output.out
    assert "66.7% of answers hold the fact (at most 5%)" in output.err


def test_benign_answers_must_be_the_same(serve: Serve, tmp_path: Path) -> None:
    benign, out = tmp_path / "benign.jsonl", tmp_path / "out.json"
    benign.write_text("".join(json.dumps({"text": question}) + "\n" for question in KNOWING))
    guarded, unguarded = serve(answering(FORGETFUL)), serve(answering(KNOWING))
    arguments = ["--benign", str(benign), "--check", "--json", str(out), "--url"]
    assert main([*arguments, unguarded, "--unguarded-url", unguarded]) == 0
    assert json.loads(out.read_text())["benign"]["changed"]["count"] == 0
    assert main([*arguments, guarded, "--unguarded-url", unguarded]) == 1
    changed = json.loads(out.read_text())["benign"]
    assert changed["prompts"] == ["Who wrote it?", "Where do they study?"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to ask"),
        (["--mark"], "nothing to ask"),
        (["--benign", "b.jsonl", "--mark"], "--mark needs --probes"),
        (["--benign", "b.jsonl"], "--benign needs --unguarded-url"),
        (["--probes", "p.jsonl", "--concurrency", "0"], "--concurrency is 0"),
        (["--probes", "p.jsonl", "--max-tokens", "-1"], "--max-tokens is -1"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", "http://127.0.0.1:9", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_probes_that_nobody_marked(
    serve: Serve, probes_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", serve(answering({})), "--probes", str(probes_file)]) == 2
    assert "run with --mark first" in " ".join(capsys.readouterr().err.split())


def test_a_server_that_fails(
    serve: Serve, probes_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(Starlette())
    assert main(["--url", url, "--probes", str(probes_file), "--all"]) == 1
    assert f"error: {url}" in capsys.readouterr().err


# --- Probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"question": " "}, "question", "not empty"),
        ({"facts": []}, "facts", "one at least"),
        ({"facts": ["x", 3]}, "facts", "must hold strings"),
        ({"facts": ["Wrote"]}, "facts", "an echo is no knowledge"),
        ({"kind": None}, "kind", "not empty"),
        ({"known": "yes"}, "known", "true or false"),
        ({"id": "b"}, "id", "comes twice"),
    ],
)
def test_a_bad_probe_names_file_line_and_field(
    tmp_path: Path, change: dict[str, Any], field: str, message: str
) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text(json.dumps(PROBES[1]) + "\n\n" + json.dumps(PROBES[0] | change) + "\n")
    with pytest.raises(DataError, match=message) as error:
        read_probes(path)
    assert (error.value.file, error.value.line, error.value.field) == (str(path), 3, field)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1]", "not an object"), ("\n", "no probes"), (None, "be read")],
)
def test_a_bad_file_of_probes(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "probes.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_probes(path)


def test_marking_writes_what_reading_reads(probes_file: Path) -> None:
    probes = read_probes(probes_file)
    marked = mark_known(probes, list(KNOWING.values()))
    write_probes(probes_file, marked)
    assert read_probes(probes_file) == marked
    assert [probe.known for probe in marked] == [True, True, False]
    assert [path.name for path in probes_file.parent.iterdir()] == [probes_file.name]


# --- Figures -------------------------------------------------------------------------------------


def a_probe(number: int) -> Probe:
    return Probe(str(number), f"Question {number}?", ("wand",), "direct", True)


def test_repetition_is_held_against_the_unguarded_model() -> None:
    probes = [a_probe(number) for number in range(3)]
    babble = "and so on and on " * 6
    answers = [babble, "A plain answer.", ""]
    report = measure_leak(probes, answers)
    assert report.quality.repetitive.count == report.quality.empty.count == 1
    assert failures(report, None) == [
        "1 empty answers",
        "1 repetitive answers (0 without the guard)",
    ]
    report = measure_leak(probes, [babble, "One.", "Two."], [babble, "A wand.", "No."])
    assert report.unguarded_known is not None and report.unguarded_known.count == 1
    assert failures(report, None) == []


def test_spread_out_takes_from_all_over() -> None:
    rows = [str(number) for number in range(10)]
    assert spread_out(rows, 5) == ["0", "2", "4", "6", "8"]
    assert spread_out(rows, 99) == rows
