"""The OpenAPI document says what the parser does: no field too many, none too few."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator
from starlette.routing import Route

from guard.dialect_fields import DIALECT_FIELDS
from guard.errors import RequestError
from guard.fields import FIELDS, ROUTES, Field
from guard.request import parse_request
from server.app import create_app
from server.dialects.embeddings import EmbeddingsBody
from server.dialects.messages_schema import CountBody
from server.openapi import ERRORS, document
from server.types import ServerOptions
from tests.guard.field_bodies import body_with
from tests.server.proxy_fakes import ScriptedEngine, WordGuard, error_of, live

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
TABLES = {
    **FIELDS,
    **DIALECT_FIELDS,
    "/v1/messages/count_tokens": {
        path: row
        for path, row in DIALECT_FIELDS["/v1/messages"].items()
        if re.split(r"\W", path)[0] in CountBody.__struct_fields__
    },
}
CLOSED, OPEN = ServerOptions(), ServerOptions(images="pass", embeddings="pass")
BOTH = pytest.mark.parametrize("options", [CLOSED, OPEN], ids=["closed", "open"])


def read(options: ServerOptions) -> dict[str, Any]:
    return dict(json.loads(document(options)))


def body_of(made: Mapping[str, Any], path: str) -> dict[str, Any]:
    content = made["paths"][path]["post"]["requestBody"]["content"]
    return dict(content["application/json"]["schema"])


# --- Fields ---------------------------------------------------------------------------------------


def places(schema: Any, made: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the path of every field, as the tables write it."""
    if "$ref" in schema:
        schema = made["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for one in schema.get("anyOf", ()):
        yield from places(one, made, path)
    if "items" in schema:
        yield from places(schema["items"], made, f"{path}[]")
    for name, inner in schema.get("properties", {}).items():
        place = f"{path}.{name}" if path else name
        yield place
        yield from places(inner, made, place)


def is_taken(row: Field, options: ServerOptions) -> bool:
    passed = row.setting and getattr(options, row.setting) == "pass"
    return row.treatment != "deny" or bool(passed)


def check_agreement(table: Mapping[str, Field], found: set[str], options: ServerOptions) -> None:
    """Assert that what is found is what a table takes, and what holds it or is held by it."""
    taken = {path for path, row in table.items() if is_taken(row, options)}
    assert not (few := taken - found), f"not in the document: {few}"
    assert not (many := (table.keys() - taken) & found), f"is denied: {many}"
    holders = {path[: match.start()] for path in taken for match in re.finditer(r"\.|\[\]", path)}
    inner = {path for path in found if any(path.startswith(f"{one}.") for one in taken)}
    assert not (more := found - taken - holders - inner), f"not in the table: {more}"


@BOTH
@pytest.mark.parametrize("path", sorted(TABLES))
def test_the_document_has_exactly_the_fields_that_are_taken(
    path: str, options: ServerOptions
) -> None:
    made = read(options)
    found = set(places(body_of(made, path), made))
    check_agreement(TABLES[path], found, options)
    for name in ("prompt_logprobs", "echo", "previous_response_id", "vllm_xargs"):
        assert name not in found


def test_a_field_too_few_or_too_many_is_told() -> None:
    made, table = read(CLOSED), FIELDS["/v1/chat/completions"]
    found = set(places(body_of(made, "/v1/chat/completions"), made))
    for place in ("seed", "messages[].content[].text", "tools[].function.parameters"):
        with pytest.raises(AssertionError, match="not in the document"):
            check_agreement(table, found - {place}, CLOSED)
    with pytest.raises(AssertionError, match="is denied"):
        check_agreement(table, found | {"messages[].content[].image_url"}, CLOSED)
    with pytest.raises(AssertionError, match="not in the table"):
        check_agreement(table, found | {"messages[].more"}, CLOSED)


def test_embeddings_are_there_where_they_are_offered() -> None:
    assert "/v1/embeddings" not in read(CLOSED)["paths"]
    made = read(OPEN)
    found = set(places(body_of(made, "/v1/embeddings"), made))
    assert found == set(EmbeddingsBody.__struct_fields__)


@BOTH
@pytest.mark.parametrize("path", sorted(FIELDS))
def test_what_the_parser_takes_of_every_field_is_valid_in_the_document(
    path: str, options: ServerOptions
) -> None:
    made = read(options)
    schema = body_of(made, path) | {"components": made["components"]}
    validator = Draft202012Validator(schema)
    values: list[Any] = ["a", ["a"], 1, 0.5, True, None, {"a": "b"}, {"10": 1}, "text", []]
    told = 0
    for name, row in FIELDS[path].items():
        for value in values:
            body = body_with(path, name, value)
            try:
                parse_request(path, json.dumps(body).encode(), images=options.images)
            except RequestError:
                continue
            if is_taken(row, options):
                assert validator.is_valid(body), body
                told += 1
    assert told > 60


# --- Routes and answers ---------------------------------------------------------------------------


@BOTH
def test_the_document_has_every_route_of_the_application(options: ServerOptions) -> None:
    app = create_app(WordGuard(), ScriptedEngine(), options)
    routes = {route.path for route in app.routes if isinstance(route, Route)}
    offered = routes if options.embeddings == "pass" else routes - {"/v1/embeddings"}
    assert set(read(options)["paths"]) == offered
    judged = {path for path, item in read(options)["paths"].items() if "post" in item}
    assert {f"POST {path}" for path in judged} <= ROUTES.keys()
    app.state.proxy.close()


def test_errors_are_those_of_the_docs() -> None:
    text = DOCS.read_text().partition("## Errors")[2].partition("\n## ")[0]
    assert {int(status) for status in re.findall(r"^\| (\d{3}) \|", text, re.M)} == set(ERRORS)
    for path, item in read(OPEN)["paths"].items():
        for operation in item.values():
            failures = {int(status) for status in operation["responses"]} - {200}
            assert failures <= set(ERRORS)
            assert failures == set(ERRORS) or "requestBody" not in operation, path


@BOTH
def test_schemas_are_valid_and_all_in_use(options: ServerOptions) -> None:
    made = read(options)
    schemas = made["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator(schema | {"components": made["components"]})
    used = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(made)))
    assert used == schemas.keys()


# --- Who may read it ------------------------------------------------------------------------------


def test_without_keys_everyone_may_read_it() -> None:
    with live() as app:
        answer = app.http.get("/openapi.json")
        assert answer.headers["content-type"] == "application/json"
        assert answer.content == document(ServerOptions())
        assert "securitySchemes" not in answer.json()["components"]
        assert app.http.head("/openapi.json").status_code == 200


def test_with_keys_it_asks_for_one_as_models_do() -> None:
    with live(ServerOptions(api_keys=("secret",))) as app:
        refused = app.http.get("/openapi.json")
        assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
        headers = {"authorization": "Bearer secret"}
        made = app.http.get("/openapi.json", headers=headers).json()
        wanted = {
            path
            for path, item in made["paths"].items()
            if any("security" in operation for operation in item.values())
        }
        for path, item in made["paths"].items():
            method = "POST" if "post" in item else "GET"
            status = app.http.request(method, path, json={}).status_code
            assert (status == 401) == (path in wanted), path
