"""Models behind endpoints of this process, asked over HTTP as clients ask.

The whole way of a request is taken: the proxy, the guard's decision and rewriting, the engine. The
engine answers many clients in batches, so that sampling thousands of answers takes minutes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from guard.errors import EngineUnavailableError
from guard.types import Progress

if TYPE_CHECKING:
    import openai

    from server.engines.base import Engine
    from server.types import GuardLike

CLIENTS: Final = 32
AT_ONCE: Final = 10
"""Answers of one request; the guard's limit for `n` is 16."""

START_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Answers:
    """How answers are drawn.

    Attributes:
        max_tokens: New tokens at most.
        temperature: 0 is greedy.
        count: Answers to each question.
        seed: Of the sampler.
    """

    max_tokens: int = 32
    temperature: float = 0.0
    count: int = 1
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A served model.

    Attributes:
        client: The official client.
        model: The model's name.
        system: A system message for every question; None sends none.
    """

    client: openai.OpenAI
    model: str
    system: str | None = None

    def ask(
        self, questions: Sequence[str], how: Answers, what: str, progress: Progress
    ) -> list[list[str]]:
        """Return each question's answers."""
        found: list[list[str]] = []
        with ThreadPoolExecutor(CLIENTS) as pool:
            for answers in pool.map(lambda question: self._one(question, how), questions):
                found.append(answers)
                progress(what, len(found), len(questions))
        return found

    def _one(self, question: str, how: Answers) -> list[str]:
        found: list[str] = []
        while len(found) < how.count:
            found += self._some(question, how, min(AT_ONCE, how.count - len(found)), len(found))
        return found

    def _some(self, question: str, how: Answers, count: int, drawn: int) -> list[str]:
        options: dict[str, Any] = {} if how.seed is None else {"seed": how.seed + drawn}
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=messages(question, self.system),  # type: ignore[arg-type]
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            n=count,
            **options,
        )
        return [choice.message.content or "" for choice in answer.choices]


def messages(question: str, system: str | None = None) -> list[dict[str, str]]:
    """Return the conversation that asks a question."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": question}]


@contextmanager
def served(engine: Engine, guard: GuardLike | None, model: str) -> Iterator[Endpoint]:
    """Serve an engine on a free port of this machine, behind a guard or bare.

    Args:
        engine: Started and closed with the endpoint.
        guard: Decides and rewrites; None serves the engine as it is.
        model: The name that the engine serves.

    Raises:
        EngineUnavailableError: The server did not start.
    """
    import openai

    from server.app import create_app
    from server.run import make_server
    from server.standin import create_standin
    from server.types import ServerOptions

    options = ServerOptions(max_waiting=CLIENTS * 4, decide_timeout_s=600.0)
    app = create_standin(engine) if guard is None else create_app(guard, engine, options)
    address: list[str] = []
    started = threading.Event()

    def on_started(found: str) -> None:
        address.append(found)
        started.set()

    server = make_server(app, port=0, shutdown_timeout_s=5, on_started=on_started)
    thread = threading.Thread(target=server.run, name="served", daemon=True)
    thread.start()
    try:
        _wait(started, thread)
        client = openai.OpenAI(
            base_url=f"{address[0]}/v1", api_key="unused", max_retries=3, timeout=3600
        )
        with client:
            yield Endpoint(client, model)
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def _wait(started: threading.Event, thread: threading.Thread) -> None:
    waited = 0.0
    while not started.wait(0.2):
        waited += 0.2
        if not thread.is_alive() or waited > START_S:
            raise EngineUnavailableError("the benchmark's server did not start; see its log above")
