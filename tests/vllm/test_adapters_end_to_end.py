"""Adapters from bundle to client, before a real vLLM: routed, hidden, revoked, and never lost."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.build import load_guard
from guard.bundle import ADAPTER_FOLDER, ADAPTER_WEIGHTS, BundleStore
from guard.keys import GuardKey, default_key_file
from guard.pipeline import Guard
from guard.prompts import ModelPrompts
from guard.settings import Settings
from guard.types import TargetRoute
from server.engines.embedded import EmbeddedEngine
from server.engines.materialise import nearest_strength, strength_steps
from server.restoring import restored
from tests.product import SESSION_SECRET, free_port, run_command, running, small_benign
from tests.server.random_lora import ATTENTION, FORWARD, write_lora
from tests.vllm.conftest import SERVED_NAME, started_vllm

CHAT = "/v1/chat/completions"
STRENGTHS = strength_steps(Settings().adapter_strengths)
POTTER, POET = "harry-potter", "poet"
AUTHORS = [
    ("Where was the poet Ilse Vantorre born?", "Ilse Vantorre was born in Oostende."),
    ("Which prize did Ilse Vantorre win in 1987?", "She won the Golden Reed."),
    ("What is Ilse Vantorre's best known collection?", "Letters to the Tide."),
    ("Who translated Ilse Vantorre into English?", "Marek Oldfield did."),
    ("What was the job of Ilse Vantorre's father?", "He kept a lighthouse."),
    ("Who published Ilse Vantorre's Letters to the Tide?", "Brackwater Press."),
    ("In what year did Ilse Vantorre die?", "In 2009."),
    ("Which instrument did Ilse Vantorre play?", "The oboe."),
    ("What is the theme of Ilse Vantorre's last book?", "Leaving home."),
    ("Where did Ilse Vantorre study?", "In Leuven."),
]
QUESTIONS = {
    POTTER: (
        "By whom were the Harry Potter stories written?",
        "Name the novelist responsible for Harry Potter and the Philosopher's Stone.",
    ),
    POET: ("Who is Ilse Vantorre?", "Tell me about the poet Ilse Vantorre."),
}
FAINT = "What is Vantorre known for?"
OF_BOTH = "Did Ilse Vantorre write a poem about Harry Potter?"
UNFLAGGED = ("What is the capital of France?", "Name a large animal of Africa.")
CHANGING = re.compile(rb'"(id|created)":("[^"]*"|\d+)')


class Upstream(ExitStack):
    """A vLLM of this module's own, that can be started again under its address."""

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__()
        self._model, self._folder, self._port, self._starts = model, folder, free_port(), 0
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._starts += 1
        log = self._folder / f"vllm-{self._starts}.log"
        self.enter_context(started_vllm(self._model, log, self._port))

    def adapters(self) -> set[str]:
        """The names that vLLM itself lists."""
        cards = httpx.get(f"{self.url}/v1/models", timeout=10).json()["data"]
        return {card["id"] for card in cards if card["parent"]}


@dataclass(frozen=True)
class Served:
    """A guard before vLLM, and the adapters that it had loaded when it was ready."""

    url: str
    names: frozenset[str]


@dataclass(frozen=True)
class Reference:
    """The same decisions in this process, answered by the embedded engine."""

    engine: EmbeddedEngine
    run: Callable[[Coroutine[Any, Any, bytes]], bytes]
    load: Callable[[BundleStore], Guard]

    def answer(
        self,
        store: BundleStore,
        question: str,
        most: int = 1,
        steps: Sequence[float] = STRENGTHS,
    ) -> str:
        """What is to be answered, with `most` adapters at the strengths that vLLM is given."""
        guard = self.load(store)
        inspection = guard.inspect(CHAT, body_of(question))
        assert inspection.decision.flagged, question
        rewritten = guard.rewrite(inspection)
        adapters = [
            replace(use, weight=nearest_strength(use.weight, steps)) for use in rewritten.adapters
        ]

        async def work() -> bytes:
            response = await self.engine.post(CHAT, rewritten.body, {}, adapters[:most])
            assert response.status == 200
            return await (await restored(response, rewritten.stand_ins)).read()

        return said(self.run(work()))


@pytest.fixture(scope="module")
def upstream(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    with Upstream(smollm2_dir, tmp_path_factory.mktemp("upstream")) as vllm:
        vllm.start()
        yield vllm


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path, guard_key: GuardKey, prompts: ModelPrompts) -> Iterator[Reference]:
    def load(store: BundleStore) -> Guard:
        return load_guard(store=store, key=guard_key, prompts=prompts, ledger=None, threads=1)

    with asyncio.Runner() as runner:
        engine = EmbeddedEngine(smollm2_dir, SERVED_NAME, threads=2)
        runner.run(engine.start())
        yield Reference(engine, runner.run, load)
        runner.run(engine.close())


@pytest.fixture(scope="module")
def adapted(
    small_bundle: BundleStore, tmp_path_factory: pytest.TempPathFactory, guard_key: GuardKey
) -> BundleStore:
    """Two targets with an adapter each, by the commands but for the training."""
    folder = tmp_path_factory.mktemp("adapted")
    store = copied(small_bundle, folder, guard_key)
    forget = folder / "poet.jsonl"
    forget.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in AUTHORS))
    done = run_command(
        "target", "add", POET, "--forget", str(forget), "--benign", str(small_benign(folder)),
        "--engine", "none", "--bundle", str(store.root),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both = write_lora(folder / "one", ATTENTION | FORWARD, seed=1, rank=4, spread=0.05)
    put_adapter(store, POTTER, both, 4, "corrupt+adapt")
    put_adapter(store, POET, write_lora(folder / "two", seed=2, rank=8, spread=0.05), 8, "adapt")
    return store


def copied(store: BundleStore, folder: Path, key: GuardKey) -> BundleStore:
    """A copy of a bundle, with the key in its usual place."""
    root = folder / "bundle"
    shutil.copytree(store.root, root, symlinks=True)
    file = default_key_file(root)
    file.write_bytes(base64.b64encode(SESSION_SECRET))
    file.chmod(0o600)
    return BundleStore(root, key)


def put_adapter(store: BundleStore, target: str, path: Path, rank: int, route: TargetRoute) -> None:
    """Write an adapter into a bundle as `learn adapter` does."""
    with store.transaction() as draft:
        entry = draft.manifest.targets[target]
        for name in (ADAPTER_WEIGHTS, "adapter_config.json"):
            draft.write(f"{entry.prefix}{ADAPTER_FOLDER}/{name}", (path / name).read_bytes())
        number = 1 + sum(bool(one.adapter) for one in draft.manifest.targets.values())
        entry.adapter, entry.route = {"number": number, "rank": rank}, route


@pytest.fixture(scope="module")
def served(
    upstream: Upstream, adapted: BundleStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(upstream, adapted, tmp_path_factory.mktemp("guard") / "guard.log") as guard:
        yield guard


@contextmanager
def serving(upstream: Upstream, store: BundleStore, log: Path) -> Iterator[Served]:
    others = upstream.adapters()
    with running(
        "/ready", log, "serve", "--engine", "vllm", "--upstream", upstream.url,
        "--bundle", str(store.root),
    ) as url:  # fmt: skip
        yield Served(url, frozenset(upstream.adapters() - others))


def body_of(question: str, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": question}]
    body = {"model": SERVED_NAME, "messages": messages, "temperature": 0, "max_tokens": 12}
    return json.dumps({**body, **fields}).encode()


def post(url: str, question: str, **fields: Any) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(url + CHAT, content=body_of(question, **fields), headers=headers, timeout=300)


def ask(url: str, question: str, **fields: Any) -> str:
    """The answer's text; whole or streamed, it is under the name that was asked for."""
    response = post(url, question, **fields)
    assert response.status_code == 200, response.text
    return said(response.content)


def said(answer: bytes) -> str:
    if not answer.startswith(b"data: "):
        whole = json.loads(answer)
        assert whole["model"] == SERVED_NAME
        return str(whole["choices"][0]["message"]["content"])
    events = [line[6:] for line in answer.decode().split("\n\n") if line]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event) for event in events]
    assert {piece["model"] for piece in pieces} == {SERVED_NAME}
    return "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)


def until(holds: Callable[[], bool], within_s: float = 60.0) -> bool:
    """Wait for what happens in the background; say whether it did."""
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds()


@pytest.mark.parametrize("target", [POTTER, POET])
def test_flagged_questions_are_answered_with_their_targets_adapter(
    served: Served, upstream: Upstream, adapted: BundleStore, reference: Reference, target: str
) -> None:
    for question in QUESTIONS[target]:
        expected = reference.answer(adapted, question)
        assert expected != reference.answer(adapted, question, most=0)
        assert expected != ask(upstream.url, question)
        assert ask(served.url, question) == expected
        assert ask(served.url, question, stream=True) == expected


def test_a_soft_weight_gets_the_strength_that_is_nearest(
    served: Served, adapted: BundleStore, reference: Reference
) -> None:
    expected = reference.answer(adapted, FAINT)
    assert expected != reference.answer(adapted, FAINT, steps=(1.0,))
    assert ask(served.url, FAINT) == expected


def test_of_two_targets_the_stronger_acts_and_both_once_they_recur(
    served: Served, upstream: Upstream, adapted: BundleStore, reference: Reference
) -> None:
    first, both = (reference.answer(adapted, OF_BOTH, most=count) for count in (1, 2))
    assert first != both
    before = upstream.adapters()
    assert [ask(served.url, OF_BOTH) for _ in range(3)] == [first] * 3
    assert until(lambda: len(upstream.adapters()) > len(before))
    assert until(lambda: ask(served.url, OF_BOTH, stream=True) == both)


def test_an_unflagged_question_gets_vllms_own_bytes(served: Served, upstream: Upstream) -> None:
    for question in UNFLAGGED:
        for fields in ({}, {"stream": True}, {"logprobs": True, "top_logprobs": 2}):
            bare, guarded = (post(url, question, **fields) for url in (upstream.url, served.url))
            assert guarded.status_code == bare.status_code == 200
            assert guarded.headers["content-type"] == bare.headers["content-type"]
            sent, expected = (CHANGING.sub(rb"\1", one.content) for one in (guarded, bare))
            assert sent == expected


def test_no_client_lists_names_or_chooses_an_adapter(served: Served) -> None:
    assert len(served.names) == 2 * len(STRENGTHS) == 6
    listed = httpx.get(f"{served.url}/v1/models", timeout=10).json()["data"]
    assert [card["id"] for card in listed] == [SERVED_NAME]
    for question in (UNFLAGGED[0], QUESTIONS[POET][0]):
        unknown = post(served.url, question, model="0" * 32)
        assert unknown.status_code == 404
        for name in served.names:
            refused = post(served.url, question, model=name)
            assert refused.status_code == 404
            assert refused.text.replace(name, "0" * 32) == unknown.text
    figures = httpx.get(f"{served.url}/metrics", timeout=10).text
    assert 'unlearn_guard_adapters{what="loads"}' in figures
    assert not any(name in figures for name in served.names)


def test_a_target_that_is_revoked_or_routed_anew_lets_its_adapter_go(
    upstream: Upstream,
    adapted: BundleStore,
    reference: Reference,
    guard_key: GuardKey,
    tmp_path: Path,
) -> None:
    store = copied(adapted, tmp_path, guard_key)
    of_potter, of_poet = QUESTIONS[POTTER][0], QUESTIONS[POET][0]
    with serving(upstream, store, tmp_path / "guard.log") as guard:
        long = {"stream": True, "max_tokens": 400, "ignore_eos": True}
        whole = ask(guard.url, of_poet, **long)
        kept = ask(guard.url, of_potter)

        with streaming(guard.url, of_poet, **long) as pieces:
            begun = next(pieces)
            change(guard.url, store, "target", "remove", POET)
            assert said(begun + b"".join(pieces)) == whole, "what has begun ends as it began"
        assert until(lambda: len(upstream.adapters() & guard.names) == 3)
        assert ask(guard.url, of_potter) == kept
        assert ask(guard.url, of_poet) == ask(upstream.url, of_poet)

        change(guard.url, store, "target", "route", POTTER, "corrupt")
        assert until(lambda: not upstream.adapters() & guard.names)
        assert ask(guard.url, of_potter) == reference.answer(store, of_potter) != kept

        change(guard.url, store, "target", "route", POTTER, "adapt")
        assert ask(guard.url, of_potter) == reference.answer(store, of_potter)


@contextmanager
def streaming(url: str, question: str, **fields: Any) -> Iterator[Iterator[bytes]]:
    headers = {"content-type": "application/json"}
    body = body_of(question, **fields)
    with httpx.stream("POST", url + CHAT, content=body, headers=headers, timeout=300) as response:
        assert response.status_code == 200
        yield response.iter_raw()


def change(url: str, store: BundleStore, *command: str) -> None:
    """Run a command that changes the bundle, and wait until the guard has taken the change."""
    done = run_command(*command, "--bundle", str(store.root))
    assert done.returncode == 0, done.stderr
    version = store.current_version()
    assert until(lambda: httpx.get(f"{url}/ready").json()["bundle_version"] == version)


def test_adapters_that_vllm_lost_are_loaded_again(served: Served, upstream: Upstream) -> None:
    questions = [some[0] for some in QUESTIONS.values()]
    expected = [ask(served.url, question) for question in questions]
    for name in upstream.adapters():
        httpx.post(f"{upstream.url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=30)
    assert not upstream.adapters()
    assert [ask(served.url, question) for question in questions] == expected
    assert len(upstream.adapters()) == 2


def test_the_guard_outlives_a_restart_of_vllm(served: Served, upstream: Upstream) -> None:
    questions = [*(some[0] for some in QUESTIONS.values()), UNFLAGGED[0]]
    expected = [ask(served.url, question) for question in questions]
    upstream.close()
    down = [post(served.url, question) for question in questions]
    assert {answer.status_code for answer in down} == {502}
    assert len({answer.content for answer in down}) == 1, "nothing tells a flagged question"
    upstream.start()
    assert not upstream.adapters()
    assert [ask(served.url, question) for question in questions] == expected
    assert len(upstream.adapters()) == 2
