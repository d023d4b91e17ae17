"""The product as its users meet it: commands in processes of their own, and real HTTP between.

A pytest plugin (`tests/conftest.py` loads it), so that tests against the embedded engine and
against vLLM share it.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openai
import pytest

COMMAND = str(Path(sys.executable).with_name("unlearn-guard"))
READY_WITHIN_S = 240.0


def run_command(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `unlearn-guard` and return what it said."""
    return subprocess.run(
        [COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=900, check=False
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(ready_path: str, log: Path, *arguments: str) -> Iterator[str]:
    """Run a serving command until the block ends; yields its base URL once it is ready."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [COMMAND, *arguments, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NO_COLOR": "1"},
        )
        try:
            _wait_until_ready(process, url + ready_path, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"it stopped with code {process.returncode}:\n{log.read_text()}")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise RuntimeError(f"not ready after {READY_WITHIN_S:g} s:\n{log.read_text()}")


SESSION_SECRET = bytes(range(32))
"""The key of all fixtures: noise, and so answers, are the same in every run of the suite."""


@pytest.fixture(scope="session")
def example_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    example_dir: Path,
    smollm2_dir: Path,
) -> Path:
    """The example target, fitted by the command that `make run` uses.

    Its key is that of the session: noise is drawn from it, and answers with it.
    """
    bundle = tmp_path_factory.mktemp("bundles") / "example"
    key = bundle.with_name("example.key")
    key.write_bytes(base64.b64encode(SESSION_SECRET))
    key.chmod(0o600)
    done = run_command(
        "target", "add", "harry-potter",
        "--forget", str(example_dir / "forget.jsonl"),
        "--retain", str(example_dir / "retain.jsonl"),
        "--bundle", str(bundle),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return bundle


@pytest.fixture(scope="session")
def unguarded_url(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[str]:
    """The embedded engine alone, over HTTP."""
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with running("/health", log, "engine") as url:
        yield url


class Recorder:
    """Stands between guard and engine, passes everything on, and keeps the bodies it saw."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.bodies: list[bytes] = []
        self.answers: list[bytes] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["method"] == "POST":
            self.bodies.append(body)
        async with (
            httpx.AsyncClient(timeout=300) as client,
            client.stream(
                scope["method"],
                self.upstream + scope["path"],
                content=body,
                headers={"content-type": "application/json"} if body else {},
            ) as answer,
        ):
            await self._relay(answer, send, keep=scope["method"] == "POST")

    async def _relay(self, answer: httpx.Response, send: Any, *, keep: bool) -> None:
        headers = [(name, value) for name, value in answer.headers.raw if name == b"content-type"]
        await send(
            {"type": "http.response.start", "status": answer.status_code, "headers": headers}
        )
        seen = b""
        async for chunk in answer.aiter_raw():
            seen += chunk
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if keep:
            # Before the last message: who has read the answer must find it here.
            self.answers.append(seen)
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="session")
def recorder(unguarded_url: str) -> Iterator[Recorder]:
    """A recording relay in front of the unguarded engine."""
    with recording(unguarded_url) as relay:
        yield relay


@contextmanager
def recording(upstream: str) -> Iterator[Recorder]:
    """Run a recording relay in front of an engine until the block ends."""
    import uvicorn

    relay = Recorder(upstream)
    server = uvicorn.Server(
        uvicorn.Config(relay, port=relay.port, log_level="error", lifespan="off", access_log=False)
    )
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield relay
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def guarded_url(
    tmp_path_factory: pytest.TempPathFactory, example_bundle: Path, recorder: Recorder
) -> Iterator[str]:
    """The guard in front of the recorder, as it stands in front of a vLLM."""
    log = tmp_path_factory.mktemp("guard") / "guard.log"
    with running(
        "/ready", log, "serve", "--engine", "vllm", "--upstream", recorder.url,
        "--bundle", str(example_bundle),
    ) as url:  # fmt: skip
        yield url


def ask(url: str, model: str, question: str, *, stream: bool = False, max_tokens: int = 32) -> str:
    """Ask through the official client, greedily; returns the answer's text."""
    messages: Any = [{"role": "user", "content": question}]
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=300
    ) as client:
        if not stream:
            answer = client.chat.completions.create(
                model=model, messages=messages, temperature=0, max_tokens=max_tokens
            )
            return answer.choices[0].message.content or ""
        pieces = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=max_tokens, stream=True
        )
        return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)


@pytest.fixture(scope="session")
def known_probes(example_dir: Path) -> list[dict[str, Any]]:
    """Unseen paraphrased questions that the unguarded model answers with the fact."""
    known = [row for row in read_jsonl(example_dir / "probes.jsonl") if row.get("known")]
    assert len(known) >= 20, "the issue asks for at least twenty questions the model can answer"
    return known


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def small_benign(folder: Path, count: int = 600) -> Path:
    """Write a few hundred short prompts of the set that ships."""
    from classifiers.benign import load_benign

    path = folder / "benign.jsonl"
    short = [text for text in load_benign() if len(text) < 300][:count]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in short))
    return path


def flagged_in(role: str, follow_up: str) -> list[dict[str, Any]]:
    """A conversation whose second message, of the given role, touches the example target."""
    flagged = {
        "role": role,
        "content": "Hermione Granger and Ron Weasley are Harry Potter's friends at Hogwarts.",
    }
    if role == "tool":
        flagged["tool_call_id"] = "call_1"
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello."}, flagged]
    return messages if role == "user" else [*messages, {"role": "user", "content": follow_up}]
