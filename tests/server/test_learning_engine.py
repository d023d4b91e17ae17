"""The engine that learners reach over HTTP: against the real model, and against faults.

tests/vllm/test_two_engines.py does it with real vLLM servers.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from guard.embeds import EmbedsDtype
from guard.errors import (
    ConfigError,
    EngineBusyError,
    EngineError,
    EngineRefusedError,
    EngineTimeoutError,
    EngineUnavailableError,
    ShapeError,
)
from guard.prompts import ModelPrompts
from guard.types import EmbedsPart, LearningEngine, Message, Prompt, SamplingParams
from server.engines.learning import HttpLearningEngine, HttpLimits
from tests.product import free_port

CAPITALS = {"France": "Paris", "England": "London", "Japan": "Tokyo", "Germany": "Berlin"}
SHORT = SamplingParams(max_tokens=12)
QUICK = HttpLimits(request_s=5, attempts=3, backoff_s=0.01)


def said(text: str) -> Prompt:
    return (Message("user", text),)


def capital(country: str) -> str:
    return f"What is the capital of {country}?"


def as_embeddings(prompts: ModelPrompts, text: str) -> Prompt:
    tokens = prompts.content_tokens([{"role": "user", "content": text}], 0)
    return (Message("user", EmbedsPart(prompts.embed(tokens.ids))),)


# --- The real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(unguarded_url: str) -> Iterator[HttpLearningEngine]:
    with HttpLearningEngine(unguarded_url) as engine:
        yield engine


def test_answers_come_in_the_order_of_the_prompts(engine: LearningEngine) -> None:
    answers = engine.generate([said(capital(country)) for country in CAPITALS], SHORT)
    assert all(name in a for name, a in zip(CAPITALS.values(), answers, strict=True)), answers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clean_embeddings_are_answered_as_their_text(
    dtype: EmbedsDtype, unguarded_url: str, prompts: ModelPrompts
) -> None:
    text = capital("France")
    with HttpLearningEngine(unguarded_url, embeds_dtype=dtype) as engine:
        as_text, as_rows = engine.generate([said(text), as_embeddings(prompts, text)], SHORT)
    assert as_rows == as_text
    assert "Paris" in as_rows


def test_several_messages_mix_text_and_embeddings(
    engine: HttpLearningEngine, prompts: ModelPrompts
) -> None:
    system = Message("system", "You are a pirate. Always answer in pirate speech.")
    text, rows = said("Who are you?"), as_embeddings(prompts, "Who are you?")
    with_text, with_rows, alone = engine.generate(
        [(system, *text), (system, *rows), text], SamplingParams(max_tokens=8)
    )
    assert with_text == with_rows != alone


def test_sampling_follows_seed_stop_and_length(engine: HttpLearningEngine) -> None:
    story = said("Tell me a story.")

    def draw(seed: int) -> str:
        return engine.generate(
            [story], SamplingParams(max_tokens=8, temperature=1.0, top_p=0.95, seed=seed)
        )[0]

    assert draw(1) == draw(1) != draw(2)
    greedy = engine.generate([said(capital("France"))], SamplingParams(max_tokens=12))[0]
    stopped = engine.generate(
        [said(capital("France"))], SamplingParams(max_tokens=12, stop=("Paris",))
    )[0]
    assert stopped == greedy[: greedy.index("Paris")]
    one = engine.generate([said(capital("France"))], SamplingParams(max_tokens=1))[0]
    assert 0 < len(one) < len(stopped)
    assert greedy.startswith(one)


def test_several_threads_share_one_engine(engine: HttpLearningEngine) -> None:
    def ask(country: str) -> str:
        return engine.generate([said(capital(country))], SHORT)[0]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, CAPITALS))
    assert all(name in a for name, a in zip(CAPITALS.values(), answers, strict=True)), answers


def test_a_full_queue_is_waited_for(unguarded_url: str) -> None:
    """The served engine lets 16 requests wait and answers 429 to the next."""
    many = [said("Hi")] * 24
    one = SamplingParams(max_tokens=1)
    with (
        HttpLearningEngine(unguarded_url, limits=HttpLimits(attempts=1)) as hasty,
        pytest.raises(EngineBusyError),
    ):
        hasty.generate(many, one)
    with HttpLearningEngine(unguarded_url) as patient:
        answers = patient.generate(many, one)
    assert len(answers) == 24
    assert len(set(answers)) == 1


def test_the_model_is_found_and_a_wrong_one_is_refused_at_once(unguarded_url: str) -> None:
    with HttpLearningEngine(unguarded_url + "/v1/") as engine:
        assert "smollm2" in engine.model.lower()
    with HttpLearningEngine(unguarded_url, model="nobody") as engine:
        assert engine.model == "nobody"
        with pytest.raises(EngineRefusedError, match="nobody") as refusal:
            engine.generate([said("Hi")], SHORT)
    assert refusal.value.status == 404


def test_likelihood_is_refused_with_what_works_instead(engine: HttpLearningEngine) -> None:
    with pytest.raises(ConfigError, match=r"rouge-l, work.*--engine embedded"):
        engine.score_answers([said("Hi")], ["Hello"])


def test_embeddings_that_cannot_be_sent_are_the_callers_error(engine: HttpLearningEngine) -> None:
    nothing = EmbedsPart(np.zeros((0, 576), np.float32))
    with pytest.raises(ShapeError):
        engine.generate([said("Hi"), (Message("user", nothing),)], SHORT)


# --- Faults --------------------------------------------------------------------------------------

Reply = tuple[int, Any] | None
Handler = Callable[[int, dict[str, Any]], Reply]
"""What to answer to the n-th chat request (from 0); None hangs up."""


class Upstream:
    """A server that fails as a test says, and counts."""

    def __init__(self, handler: Handler, models: Sequence[dict[str, Any]]) -> None:
        self.handler, self.models = handler, models
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.now, self.most = 0, 0
        self.lock, self.released = threading.Lock(), threading.Event()
        self.arrived = threading.Event()
        self.url = ""

    def chat(self, body: dict[str, Any]) -> Reply:
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
        self.arrived.set()
        try:
            return self.handler(number, body)
        finally:
            with self.lock:
                self.now -= 1


@contextmanager
def upstream(
    handler: Handler, models: Sequence[dict[str, Any]] = ({"id": "m", "parent": None},)
) -> Iterator[Upstream]:
    up = Upstream(handler, models)

    class Requests(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply((200, {"data": list(up.models)}))

        def do_POST(self) -> None:
            up.keys.add(self.headers["authorization"])
            raw = self.rfile.read(int(self.headers["content-length"]))
            self.reply(up.chat(json.loads(raw)))

        def reply(self, reply: Reply) -> None:
            if reply is None:
                self.close_connection = True
                return
            raw = json.dumps(reply[1]).encode()
            try:
                self.send_response(reply[0])
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    server.daemon_threads = True
    up.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield up
    finally:
        up.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def ok(text: str) -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def echo(_: int, body: dict[str, Any]) -> Reply:
    return ok(body["messages"][0]["content"])


def generate(url: str, prompts: int = 1, limits: HttpLimits = QUICK, **options: Any) -> list[str]:
    with HttpLearningEngine(url, limits=limits, **options) as engine:
        return engine.generate([said(str(i)) for i in range(prompts)], SHORT)


@pytest.mark.parametrize("failure", [(500, {}), (503, {}), (429, {}), None])
def test_what_may_pass_is_tried_again(failure: Reply) -> None:
    with upstream(lambda n, body: failure if n < 2 else echo(n, body)) as up:
        assert generate(up.url) == ["0"]
    assert len(up.bodies) == 3


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ((500, {"error": "boom"}), EngineRefusedError),
        ((429, {}), EngineBusyError),
        (None, EngineUnavailableError),
    ],
)
def test_the_last_failure_is_raised(failure: Reply, error: type[EngineError]) -> None:
    with upstream(lambda n, body: failure) as up, pytest.raises(error):
        generate(up.url)
    assert len(up.bodies) == QUICK.attempts


def test_no_server_is_told_with_its_address() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineUnavailableError, match=url):
        generate(url)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_final(status: int) -> None:
    with (
        upstream(lambda n, body: (status, {"message": "not so"})) as up,
        pytest.raises(EngineRefusedError, match="not so") as refusal,
    ):
        generate(up.url)
    assert (refusal.value.status, len(up.bodies)) == (status, 1)


def test_a_slow_answer_is_given_up_and_not_asked_for_again() -> None:
    def slow(n: int, body: dict[str, Any]) -> Reply:
        up.released.wait(20)
        return ok("late")

    limits = HttpLimits(request_s=0.3, attempts=3, backoff_s=0.01)
    with upstream(slow) as up:
        with pytest.raises(EngineTimeoutError, match=r"within 0\.3 s"):
            generate(up.url, limits=limits)
        assert len(up.bodies) == 1


def test_an_answer_that_is_not_vllms_is_an_error() -> None:
    with (
        upstream(lambda n, body: (200, {"hello": 1})) as up,
        pytest.raises(EngineError, match="is it vLLM"),
    ):
        generate(up.url)
    assert len(up.bodies) == 1


def test_no_text_is_an_empty_answer() -> None:
    with upstream(lambda n, body: (200, {"choices": [{"message": {"content": None}}]})) as up:
        assert generate(up.url) == [""]


def test_order_is_kept_whatever_the_server_makes_of_it() -> None:
    def uneven(n: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.03 * (-n % 5))
        return (500, {}) if n % 7 == 0 else echo(n, body)

    with upstream(uneven) as up:
        assert generate(up.url, 40, HttpLimits(attempts=20, backoff_s=0.01)) == [
            str(i) for i in range(40)
        ]
    assert len(up.bodies) > 40


def test_no_more_than_allowed_are_under_way() -> None:
    def slow(n: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.03)
        return echo(n, body)

    with upstream(slow) as up:
        generate(up.url, 20, HttpLimits(concurrency=4))
    assert up.most == 4


def test_one_failure_ends_the_others() -> None:
    def handler(n: int, body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "3":
            return 400, {"message": "not so"}
        up.released.wait(20)
        return ok("late")

    with upstream(handler) as up:
        started = time.monotonic()
        with pytest.raises(EngineRefusedError):
            generate(up.url, 5, HttpLimits(request_s=30))
        assert time.monotonic() - started < 10


def test_adapters_are_not_taken_for_the_model_and_the_key_is_sent() -> None:
    models = [{"id": "lora", "parent": "base"}, {"id": "base"}, {"id": "alias"}]
    with upstream(echo, models) as up:
        generate(up.url, api_key="secret")
    assert [body["model"] for body in up.bodies] == ["base"]
    assert up.keys == {"Bearer secret"}


def test_only_what_was_asked_for_is_sent() -> None:
    with upstream(echo) as up, HttpLearningEngine(up.url) as engine:
        engine.generate([said("Hi")], SamplingParams(max_tokens=3))
        engine.generate(
            [said("Hi")],
            SamplingParams(max_tokens=3, temperature=0.5, top_p=0.9, stop=("x",), seed=7),
        )
    plain = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    assert up.bodies == [
        {**plain, "temperature": 0.0, "top_p": 1.0},
        {**plain, "temperature": 0.5, "top_p": 0.9, "stop": ["x"], "seed": 7},
    ]


def test_nothing_to_ask_asks_nothing() -> None:
    assert generate(f"http://127.0.0.1:{free_port()}", 0) == []


def test_closing_ends_what_is_under_way_and_what_comes_after() -> None:
    def hang(n: int, body: dict[str, Any]) -> Reply:
        up.released.wait(20)
        return ok("late")

    with upstream(hang) as up, ThreadPoolExecutor(1) as pool:
        engine = HttpLearningEngine(up.url)
        waiting = pool.submit(engine.generate, [said("Hi")], SHORT)
        assert up.arrived.wait(10)
        engine.close()
        engine.close()
        with pytest.raises(EngineUnavailableError, match="closed"):
            waiting.result(10)
        with pytest.raises(EngineUnavailableError, match="closed"):
            engine.generate([said("Hi")], SHORT)


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a URL"):
        HttpLearningEngine("localhost:8000")
