"""Nothing goes round the guard: no field, no route, no trick of a parser.

A question about what was forgotten is planted in requests of every shape that the structs allow,
and sent through the real application with the real detector to an engine that records. It must be
refused, or have been judged and taken out; the engine never sees it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.fields import FIELDS, ROUTES
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.pipeline import Guard
from guard.prompts import ModelPrompts
from guard.request import ENDPOINTS
from guard.schema import BODIES, TEMPLATE_ARGUMENTS
from server.app import create_app
from server.dialects.messages_schema import CountBody, MessagesBody
from server.dialects.responses_schema import ResponsesBody
from server.engines.base import EngineResponse
from tests.guard.field_bodies import body_with, declared
from tests.server.proxy_fakes import ANSWER, EVENTS, SSE, ScriptedEngine

CHAT, TEXT = ENDPOINTS
QUESTIONS = (
    "Which house was Hermione Granger sorted into at Hogwarts?",
    "Who is Harry Potter?",
    "What is the name of Harry Potter's owl?",
)
BENIGN = "How do I bake bread at home?"
SHAPES = {
    **BODIES,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/v1/responses": ResponsesBody,
}
EXAMPLES = 1_000


# --- The application, without sockets ------------------------------------------------------------

ANSWERED = ANSWER[:-1] + b',"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}'


@dataclass
class Engine(ScriptedEngine):
    """Answers as engines do, with the usage that `count_tokens` wants."""

    async def post(self, path: str, body: bytes, *rest: Any) -> EngineResponse:
        stream = bool(json.loads(body).get("stream"))
        self.pieces = list(EVENTS) if stream else [ANSWERED]
        self.headers = SSE if stream else [("content-type", "application/json")]
        return await super().post(path, body, *rest)


@dataclass
class App:
    """The real application with the real guard, called in this process."""

    guard: Guard
    engine: Engine
    call: Callable[[Any, Any, Any], Awaitable[None]]
    loop: asyncio.AbstractEventLoop
    outcomes: Counter[str] = field(default_factory=Counter)

    def send(
        self, path: str, body: bytes, method: str = "POST", kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """Return status and body of the answer."""
        return self.loop.run_until_complete(self._send(path, body, method, kind))

    async def _send(self, path: str, body: bytes, method: str, kind: str) -> tuple[int, bytes]:
        headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "root_path": "",
            "scheme": "http", "server": ("127.0.0.1", 80), "http_version": "1.1",
        }  # fmt: skip
        messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []
        gone = asyncio.Event()

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.call(scope, receive, send)
        return sent[0]["status"], b"".join(one.get("body", b"") for one in sent)

    def seen(self) -> list[bytes]:
        """Return the bodies that came to the engine, and forget them."""
        bodies = [body for _, body, _ in self.engine.posts]
        self.engine.posts.clear()
        self.engine.adapters.clear()
        return bodies


@pytest.fixture(scope="module")
def app(
    small_bundle: BundleStore,
    guard_key: GuardKey,
    prompts: ModelPrompts,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[App]:
    ledger = Ledger(tmp_path_factory.mktemp("bypass") / "ledger.jsonl", guard_key)
    guard = load_guard(store=small_bundle, key=guard_key, prompts=prompts, ledger=ledger)
    engine = Engine()
    made = create_app(guard, engine)
    loop = asyncio.new_event_loop()
    yield App(guard, engine, made, loop)
    made.state.proxy.close()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_questions_are_flagged_and_the_harness_lets_others_through(
    app: App, question: str
) -> None:
    for text, reaches in ((question, False), (BENIGN, True)):
        body = {"model": "m", "messages": [{"role": "user", "content": text}]}
        assert app.send(CHAT, json.dumps(body).encode())[0] == 200
        (seen,) = app.seen()
        assert (text in texts(seen)) == reaches


def texts(body: bytes) -> str:
    """All strings and keys of a body, a line each."""
    found: list[str] = []
    stack: list[Any] = [json.loads(body)]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
    return "\n".join(found)


# --- Requests of every shape, made from the structs ----------------------------------------------

_words = st.sampled_from(["", "bread", "a small cat", "Zürich", "x\n\ny", "[1]", "\U0001f600"])
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | _words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_words, inner, max_size=2),
    max_leaves=5,
)
_free = st.dictionaries(_words, _json, max_size=3)
_prompt = (
    _words
    | st.lists(_words, min_size=1, max_size=3)
    | st.lists(st.integers(20, 900), min_size=1, max_size=3)
    | st.lists(st.lists(st.integers(20, 900), min_size=1, max_size=3), min_size=1, max_size=2)
)
_GIVEN: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("m"),
    "prompt": _prompt,
    "stream": st.just(False) | st.none(),
    "n": st.integers(1, 2),
    "echo": st.just(False),
    "suffix": st.just(""),
    "best_of": st.just(1),
    "logit_bias": st.dictionaries(st.integers(20, 900).map(str), st.floats(-5, 5), max_size=3),
    "chat_template_kwargs": _free.filter(lambda value: not TEMPLATE_ARGUMENTS & value.keys()),
}


def shapes(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type of `guard.schema`."""
    match kind:
        case inspect.Metadata():
            return shapes(kind.type)
        case inspect.UnionType():
            return st.one_of(*(shapes(one) for one in kind.types))
        case inspect.ListType() | inspect.CollectionType():
            most = min(3, 3 if kind.max_length is None else kind.max_length)
            return st.lists(shapes(kind.item_type), min_size=kind.min_length or 0, max_size=most)
        case inspect.StructType():
            return _objects(kind)
        case inspect.DictType(value_type=inspect.StrType()):
            return st.dictionaries(_words, _words, max_size=2)
        case inspect.DictType():
            return _free
        case inspect.StrType():
            return _words
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            return st.integers(max(kind.ge or 0, -1), min(kind.le or 9, 9))
        case inspect.FloatType():
            return st.floats(0.25, 1)
        case inspect.NoneType():
            return st.none()
        case inspect.AnyType():
            return _json
    raise AssertionError(kind)


def _objects(kind: inspect.StructType) -> st.SearchStrategy[Any]:
    needed: dict[str, Any] = {} if kind.tag_field is None else {kind.tag_field: st.just(kind.tag)}
    optional: dict[str, Any] = {}
    for one in kind.fields:
        top = kind.cls in SHAPES.values()
        strategy = _GIVEN[one.name] if top and one.name in _GIVEN else shapes(one.type)
        (needed if one.required else optional)[one.encode_name] = strategy
    return st.fixed_dictionaries(needed, optional=optional)


_bodies = st.one_of(
    *(st.tuples(st.just(route), shapes(inspect.type_info(SHAPES[route]))) for route in SHAPES)
)

# --- A question in one place of it ---------------------------------------------------------------

_TAGS = ("type", "role", "model", "reasoning_effort")
_FREE = ("parameters", "schema", "chat_template_kwargs", "input_schema", "input")

Place = tuple[Any, Any, bool]
"""A container, a key of it, and whether the key itself is the place."""


def places(value: Any, free: bool = False) -> Iterator[Place]:
    """Yield every place that could hold a text of a client's."""
    pairs = enumerate(value) if isinstance(value, list) else value.items()
    for key, item in list(pairs):
        tag = isinstance(value, dict) and key in _TAGS and not free
        if isinstance(item, str) and not tag:
            yield value, key, False
        if isinstance(value, dict) and free:
            yield value, key, True
        if isinstance(item, dict | list) and key != "logit_bias":
            opens = key in _FREE and isinstance(item, dict)
            yield from places(item, free or opens)


def plant(body: dict[str, Any], text: str, rng: random.Random) -> bool:
    """Put a text into a place of a body; False if it has none."""
    found = [one for one in places(body) if one[0] is not body.get("tool_choice")]
    if not found:
        return False
    holder, key, is_key = rng.choice(found)
    if is_key:
        holder[text] = holder.pop(key)
    else:
        holder[key] = text
    return True


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(
    _bodies,
    st.sampled_from(QUESTIONS),
    st.sampled_from(["{}", "{}\n", "Please: {} Thanks.", "{{}} {}"]),
    st.integers(0, 2**32),
)
def check_planted(
    app: App, shape: tuple[str, dict[str, Any]], question: str, around: str, seed: int
) -> None:
    route, body = shape[0], json.loads(json.dumps(shape[1]))
    text = around.replace("{}", question, 1)
    if not plant(body, text, random.Random(seed)):
        app.outcomes["nowhere"] += 1
        return
    status, answer = app.send(route, json.dumps(body).encode())
    seen = app.seen()
    assert status < 500, answer
    for one in seen:
        assert question not in texts(one), one
    refused = status != 200 and "can't be answered here" in answer.decode()
    app.outcomes["judged, no place" if refused else f"{status}"] += 1


def test_a_planted_question_never_reaches_the_engine(app: App) -> None:
    app.outcomes.clear()
    check_planted(app)
    found = app.outcomes
    assert found["200"] >= EXAMPLES // 5, found  # judged, and sent without it
    assert found["judged, no place"] >= EXAMPLES // 10, found  # for embeddings
    assert found["nowhere"] + found["400"] <= EXAMPLES // 2, found  # these prove little


PLACES = [(route, path) for route in ENDPOINTS for path in FIELDS[route]]


@pytest.mark.parametrize(("route", "path"), PLACES)
def test_no_field_carries_a_question_to_the_engine(app: App, route: str, path: str) -> None:
    question = QUESTIONS[0]
    row = FIELDS[route][path]
    free = any(isinstance(kind, inspect.DictType) for kind in declared(route).get(path, ()))
    forms: list[Any] = [question, [question], {"text": question}, [{"text": question}]]
    before = app.guard.prompts
    assert before is not None
    ids = before.prompt_tokens(question, add_special_tokens=False).ids
    forms += [ids, {str(one): 100 for one in ids}]
    taken = 0
    for form in forms:
        status, answer = app.send(route, json.dumps(body_with(route, path, form)).encode())
        assert status in (200, 400, 404), answer
        taken += status == 200
        for seen in app.seen():
            assert question not in texts(seen)
            # No model reads where it is to stop.
            assert str(ids)[1:-1] not in json.dumps(json.loads(seen)) or path == "stop_token_ids"
    if row.treatment == "deny":
        assert not taken
    if row.treatment == "judge" and not free:
        status, answer = app.send(route, json.dumps(body_with(route, path, BENIGN)).encode())
        app.seen()
        assert status == 200 or path == "logit_bias", answer


# --- Routes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ROUTES))
def test_a_denied_route_is_answered_with_404_or_405(app: App, name: str) -> None:
    method, path = name.split()
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTIONS[0]}]}
    body |= {"prompt": QUESTIONS[0], "input": QUESTIONS[0], "max_tokens": 5}
    path = path.replace("{response_id}", "resp_1")
    if ROUTES[name] == "deny":
        methods = {"MOUNT": ["POST"], "WEBSOCKET": ["GET", "POST"]}.get(method, [method, "PUT"])
        for one in methods:
            assert app.send(path, json.dumps(body).encode(), one)[0] in (404, 405)
        for variant in (f"{path}/", f"/{path}", f"{path}%2f", f"/v1/..{path}", f"{path};x"):
            assert app.send(variant, json.dumps(body).encode())[0] in (404, 405)
    elif ROUTES[name] == "serve":
        assert app.send(path, b"", method)[0] == 200
    else:
        status, answer = app.send(path, json.dumps(body).encode())
        assert status in (400, 403, 404), answer
    assert not app.seen()


# --- Parsers -------------------------------------------------------------------------------------

ASKED = json.dumps({"role": "user", "content": QUESTIONS[0]})
PLAIN = json.dumps({"role": "user", "content": BENIGN})


def chat_of(messages: str, more: str = "") -> bytes:
    return f'{{"model":"m","messages":[{messages}]{more}}}'.encode()


TRICKS = {
    "duplicate key": chat_of(PLAIN, f',"messages":[{ASKED}]'),
    "duplicate key, first asks": chat_of(ASKED, f',"messages":[{PLAIN}]'),
    "duplicate key, one escaped": chat_of(PLAIN, f',"me\\u0073sages":[{ASKED}]'),
    "duplicate key, in a message": chat_of(f'{PLAIN[:-1]},"content":"{QUESTIONS[0]}"}}'),
    "duplicate key, in a schema": chat_of(
        PLAIN, ',"tools":[{"function":{"name":"f","parameters":{"a":1,"a":2}}}]'
    ),
    "key in other letters": chat_of(PLAIN, f',"Messages":[{ASKED}]'),
    "key in full-width letters": chat_of(PLAIN, f',"ｍessages":[{ASKED}]'),
    "key with a combining mark": chat_of(PLAIN, f',"message\u0301s":[{ASKED}]'),
    "key with a zero-width space": chat_of(PLAIN, f',"messages\u200b":[{ASKED}]'),
    "key with white space": chat_of(PLAIN, f',"messages ":[{ASKED}]'),
    "key with a NUL": chat_of(PLAIN, f',"messages\\u0000":[{ASKED}]'),
    "prototype": chat_of(PLAIN, f',"__proto__":{{"messages":[{ASKED}]}}'),
    "trailing object": chat_of(PLAIN) + chat_of(ASKED),
    "trailing line": chat_of(PLAIN) + b"\n" + chat_of(ASKED),
    "trailing comma": chat_of(f"{PLAIN},"),
    "trailing NUL": chat_of(PLAIN) + b"\0",
    "comment": chat_of(f"{PLAIN}/*{ASKED}*/"),
    "single quotes": chat_of(PLAIN).replace(b'"', b"'"),
    "byte-order mark": b"\xef\xbb\xbf" + chat_of(ASKED),
    "UTF-16": chat_of(ASKED).decode().encode("utf-16"),
    "UTF-16 without mark": chat_of(ASKED).decode().encode("utf-16-le"),
    "UTF-32": chat_of(ASKED).decode().encode("utf-32-be"),
    "UTF-7": chat_of("+AHsAfQ-"),
    "overlong UTF-8": chat_of(PLAIN).replace(b"bake", b"\xc1\xa2ake"),
    "surrogates in UTF-8": chat_of(PLAIN).replace(b"bake", b"\xed\xa0\x80ake"),
    "lone surrogate": chat_of(PLAIN.replace("bake", "\\ud800bake")),
    "lone low surrogate": chat_of(PLAIN.replace("bake", "\\udc00\\ud800bake")),
    "lone surrogate in a key": chat_of(PLAIN, ',"chat_template_kwargs":{"\\udfff":1}'),
    "NaN": chat_of(PLAIN, ',"temperature":NaN'),
    "Infinity": chat_of(PLAIN, ',"temperature":-Infinity'),
    "too large a float": chat_of(PLAIN, ',"temperature":1e999'),
    "too large an integer": chat_of(PLAIN, ',"seed":18446744073709551616'),
    "far too large an integer": chat_of(PLAIN, f',"seed":{"9" * 5000}'),
    "hexadecimal": chat_of(PLAIN, ',"seed":0x10'),
    "leading zero": chat_of(PLAIN, ',"seed":007'),
    "plus sign": chat_of(PLAIN, ',"seed":+7'),
    "bare decimal point": chat_of(PLAIN, ',"top_p":.5'),
    "control character": chat_of(PLAIN.replace("bake", "ba\tke")),
    "too deep": chat_of(PLAIN, f',"chat_template_kwargs":{{"a":{"[" * 65}{"]" * 65}}}'),
    "far too deep": chat_of(PLAIN, f',"chat_template_kwargs":{{"a":{"[" * 90_000}'),
    "many brackets": b"[" * 250_000,
    "many values": b"[" + b"," * 1_100_000 + b"]",
    "array": f"[{chat_of(ASKED).decode()}]".encode(),
    "string": json.dumps(chat_of(ASKED).decode()).encode(),
    "nothing": b"",
    "form": b"model=m&prompt=Who+is+Harry+Potter",
    "bool for a number": chat_of(PLAIN, ',"n":true'),
    "string for a number": chat_of(PLAIN, ',"n":"2"'),
    "string for a bool": chat_of(PLAIN, ',"stream":"true"'),
    "object for messages": b'{"model":"m","messages":{"0":%s}}' % ASKED.encode(),
    "string for messages": b'{"model":"m","messages":"%s"}' % QUESTIONS[0].encode(),
    "part without type": chat_of(f'{{"role":"user","content":[{{"text":"{QUESTIONS[0]}"}}]}}'),
    "part of two types": chat_of(
        f'{{"role":"user","content":[{{"type":"text","text":"a","refusal":"{QUESTIONS[0]}"}}]}}'
    ),
    "string part": chat_of(f'{{"role":"user","content":["{QUESTIONS[0]}"]}}'),
    "unknown role": chat_of(ASKED.replace("user", "wizard")),
    "role in other letters": chat_of(ASKED.replace("user", "USER")),
}


@pytest.mark.parametrize("name", TRICKS)
def test_what_parsers_could_read_differently_is_refused(app: App, name: str) -> None:
    status, answer = app.send(CHAT, TRICKS[name])
    assert status == 400 and json.loads(answer)["error"]["code"], answer
    assert not app.seen()


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
        "application/json; charset=utf-16", "application/json, text/plain", "application/jsonl",
    ],
)  # fmt: skip
def test_other_media_types_are_refused(app: App, kind: str) -> None:
    assert app.send(CHAT, chat_of(ASKED), kind=kind)[0] == 415
    assert not app.seen()


@pytest.mark.parametrize(
    "body",
    [
        chat_of(ASKED.replace("Hermione", "\\u0048ermione")),
        chat_of(ASKED.replace("user", "\\u0075ser")),
        b" \r\n\t" + chat_of(ASKED) + b" \n",
        chat_of(ASKED).replace(b"messages", b"me\\u0073sages"),
        chat_of(ASKED, ',"stream":null,"seed":-0'),
    ],
)
def test_what_all_parsers_read_alike_is_judged_as_it_reads(app: App, body: bytes) -> None:
    assert app.send(CHAT, body)[0] == 200
    (seen,) = app.seen()
    assert "Hogwarts" not in texts(seen) and "prompt_embeds" in texts(seen)


# --- Random bodies -------------------------------------------------------------------------------

_GROWTH_BYTES = 8_000_000


def random_body(rng: random.Random) -> bytes:
    """Bytes of some sort: noise, broken JSON, or JSON of random shape under known names."""
    sort = rng.random()
    if sort < 0.2:
        return rng.randbytes(rng.randrange(300))
    if sort < 0.6:
        body = bytearray(rng.choice(list(TRICKS.values())[:40])[:2000])
        for _ in range(rng.randrange(1, 5)):
            if body:
                body[rng.randrange(len(body))] = rng.choice(b'{}[]",:0x\\\x00\xff e')
        return bytes(body)
    return json.dumps(random_value(rng, 0)).encode()


def random_value(rng: random.Random, depth: int) -> Any:
    sort = rng.randrange(8 if depth < 5 else 5)
    if depth and sort < 5:
        return rng.choice([None, True, -1, 2**63, 0.5, 1e300, "x", "text", "user", "\U0001f600"])
    names = rng.sample(NAMES, rng.randrange(6)) + (["model"] if depth == 0 else [])
    if sort == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {name: random_value(rng, depth + 1) for name in names}


NAMES = sorted({step.removesuffix("[]") for _, path in PLACES for step in path.split(".")})


def sent_at_random(app: App, count: int, seed: int) -> Counter[int]:
    rng = random.Random(seed)
    routes = [name.split()[1] for name, how in ROUTES.items() if how == "guard"]
    statuses: Counter[int] = Counter()
    for _ in range(count):
        status, answer = app.send(rng.choice(routes), random_body(rng))
        assert status < 500, answer
        statuses[status] += 1
        app.seen()
    return statuses


def check_random_bodies(app: App, count: int) -> None:
    sent_at_random(app, 1_000, seed=1)  # what is made once
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        statuses = sent_at_random(app, count, seed=2)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert statuses.total() == count and statuses[400] > count / 3
    assert grown < _GROWTH_BYTES, grown


def test_random_bodies_break_nothing_and_leave_nothing_behind(app: App) -> None:
    check_random_bodies(app, 10_000)


@pytest.mark.slow
def test_many_random_bodies_break_nothing_and_leave_nothing_behind(app: App) -> None:
    check_random_bodies(app, 100_000)
