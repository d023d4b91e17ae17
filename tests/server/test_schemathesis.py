"""schemathesis over our own OpenAPI document: what it allows, and what it doesn't.

The served document, the real application and detector over real HTTP, and a vLLM of a few lines.
No answer is a 5xx, has a status or media type that the document lacks, or an error of another form;
what the document forbids is refused.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.errors import InvalidSchema

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.prompts import ModelPrompts
from server.app import create_app
from server.engines.vllm import VllmEngine
from server.openapi import document
from server.types import ServerOptions
from tests.server.fake_vllm import STREAM, chunk, fake_vllm, whole
from tests.server.proxy_fakes import EVENTS, running

OPTIONS = ServerOptions(embeddings="pass", images="pass")
EXAMPLES = 40
PLACES = [
    (path, method)
    for path, item in json.loads(document(OPTIONS))["paths"].items()
    for method in item
]
CHECKS = (
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
)


async def answers(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """Answer as vLLM does, by what is asked for."""
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    if "input" in body:
        made: dict[str, Any] = {"object": "list", "data": [], "usage": usage}
    elif body.get("stream"):
        events = EVENTS if "messages" in body else [b'data: {"choices":[]}\n\n', EVENTS[-1]]
        writer.write(STREAM + b"".join(chunk(event) for event in events) + b"0\r\n\r\n")
        return
    else:
        said = {"message": {"role": "assistant", "content": "Hello"}}
        choice = said if "messages" in body else {"text": "Hello"}
        choices = [{"index": 0, "finish_reason": "stop", **choice}]
        made = {"id": "x", "model": "m", "created": 1, "choices": choices, "usage": usage}
    writer.write(whole(json.dumps(made).encode()))


@pytest.fixture(scope="module")
def api(
    small_bundle: BundleStore,
    guard_key: GuardKey,
    prompts: ModelPrompts,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    ledger = Ledger(tmp_path_factory.mktemp("api") / "ledger.jsonl", guard_key)
    guard = load_guard(
        store=small_bundle, key=guard_key, prompts=prompts, ledger=ledger, images=OPTIONS.images
    )
    with fake_vllm() as fake:
        fake.behaviour = answers
        app = create_app(guard, VllmEngine(fake.url), OPTIONS)
        with running(app) as url:
            raw = httpx.get(f"{url}/openapi.json").json()
            for schema in raw["components"]["schemas"].values():
                if "model" in schema.get("properties", {}):
                    schema["properties"]["model"] = {"enum": ["m"]}  # all others are 404
            made = schemathesis.openapi.from_dict(raw)
            made.config.update(base_url=url)
            yield made


@pytest.mark.parametrize(("path", "method"), PLACES)
def test_every_answer_is_as_the_document_says(api: Any, path: str, method: str) -> None:
    statuses = sent(api[path][method], GenerationMode.POSITIVE, EXAMPLES if method == "post" else 1)
    # What no schema says of a body (the last message is the user's, 1.0 is no integer) is 400.
    assert statuses[200], statuses


@pytest.mark.parametrize("path", [path for path, method in PLACES if method == "post"])
def test_what_the_document_forbids_is_refused(api: Any, path: str) -> None:
    statuses = sent(api[path]["post"], GenerationMode.NEGATIVE, EXAMPLES)
    assert statuses[400] > EXAMPLES // 2 and not statuses[200], statuses


@st.composite
def made_up(draw: st.DrawFn, cases: st.SearchStrategy[Any]) -> Any:
    """Draw a case; some of its own mutations schemathesis can't make values for."""
    try:
        return draw(cases)
    except InvalidSchema:
        reject()


def sent(operation: Any, mode: GenerationMode, examples: int) -> Counter[int]:
    """Send what schemathesis makes up, check every answer, and count them by status."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(made_up(operation.as_strategy(generation_mode=mode)))
    def check(case: Any) -> None:
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=list(CHECKS))

    check()
    return statuses
