"""The table of fields: the structs, the parser, the view and the docs all do what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec import inspect

from guard.dialect_fields import DIALECT_FIELDS
from guard.errors import RequestError
from guard.fields import FIELDS, STEERING, Field, stripped, why_denied
from guard.request import ENDPOINTS, ParsedRequest, parse_request
from server.dialects.messages_schema import MessagesBody
from server.dialects.responses_schema import ResponsesBody
from tests.guard.field_bodies import body_with, declared, declared_by

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
CHAT, TEXT = ENDPOINTS
PLACES = [(route, path) for route in ENDPOINTS for path in FIELDS[route]]
JUDGED, DENIED = (
    [(route, path) for route, path in PLACES if FIELDS[route][path].treatment == treatment]
    for treatment in ("judge", "deny")
)
TEXTLESS = [place for place in PLACES if FIELDS[place[0]][place[1]].treatment in ("pass", "cap")]
DIALECTS = {"/v1/messages": MessagesBody, "/v1/responses": ResponsesBody}
SECRET = "Zanzibar"

# --- What the structs declare --------------------------------------------------------------------


def check_agreement(table: Mapping[str, Field], structs: dict[str, list[inspect.Type]]) -> None:
    """Assert that structs have exactly the fields that a table does not deny."""
    accepted = {
        path
        for path, row in table.items()
        if row.treatment != "deny" or row.harmless or row.setting
    }
    whole = {path for path in accepted if any(one.startswith(f"{path}.") for one in structs)}
    missing = accepted - structs.keys() - whole
    assert not missing, f"in the table, but in no struct: {missing}"
    objects = {holder for path in structs for holder in holders(path)}
    unknown = {
        path
        for path, kinds in structs.items()
        if path not in accepted
        and whole.isdisjoint(holders(path))
        and not (path in objects and all(isinstance(kind, inspect.NoneType) for kind in kinds))
    }
    assert not unknown, f"in a struct, but not in the table: {unknown}"


def holders(path: str) -> Iterator[str]:
    """Yield the objects and arrays that a field is in."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path.removesuffix("[]")


@pytest.mark.parametrize("route", ENDPOINTS)
def test_exactly_what_is_not_denied_is_declared(route: str) -> None:
    check_agreement(FIELDS[route], declared(route))


@pytest.mark.parametrize("route", DIALECTS)
def test_dialects_accept_exactly_what_is_not_denied(route: str) -> None:
    check_agreement(DIALECT_FIELDS[route], declared_by(DIALECTS[route]))


def test_a_table_with_a_row_too_few_or_too_many_is_told() -> None:
    table = dict(FIELDS[CHAT])
    for path in ("messages[].content[].text", "tools[].function.parameters", "seed"):
        with pytest.raises(AssertionError, match="not in the table"):
            check_agreement({k: v for k, v in table.items() if k != path}, declared(CHAT))
    for path in ("messages[].content[].more", "more"):
        with pytest.raises(AssertionError, match="in no struct"):
            check_agreement(table | {path: Field("pass")}, declared(CHAT))


@pytest.mark.parametrize(("route", "path"), TEXTLESS)
def test_only_read_or_stripped_fields_can_hold_text(route: str, path: str) -> None:
    if path == "model":
        return  # one of the engine's, or the proxy refuses
    for kind in declared(route)[path]:
        assert isinstance(
            kind,
            inspect.BoolType
            | inspect.IntType
            | inspect.FloatType
            | inspect.LiteralType
            | inspect.NoneType
            | inspect.ListType,
        )
        if isinstance(kind, inspect.ListType):
            assert kind.max_length == 0 or isinstance(kind.item_type, inspect.IntType)


@pytest.mark.parametrize(("route", "path"), PLACES)
def test_bounds_are_those_of_the_structs(route: str, path: str) -> None:
    row = FIELDS[route][path]
    assert (row.treatment == "cap") <= bool(row.bounds)
    for name, value in row.bounds.items():
        found = {getattr(kind, name, None) for kind in declared(route)[path]} - {None}
        assert found == {value}


# --- What the parser and the view do -------------------------------------------------------------


def sent(route: str, body: dict[str, Any]) -> ParsedRequest:
    return parse_request(route, json.dumps(body).encode())


def held(kinds: list[inspect.Type]) -> Any:
    """Some value of a type, that holds the secret word."""
    for kind in kinds:
        match kind:
            case inspect.StrType():
                return SECRET
            case inspect.DictType(value_type=inspect.FloatType()):
                return {"7": 1.0}
            case inspect.DictType():
                return {"key": SECRET}
    raise AssertionError(kinds)


@pytest.mark.parametrize(("route", "path"), JUDGED)
def test_judged_fields_are_read(route: str, path: str) -> None:
    request = sent(route, body_with(route, path, held(declared(route)[path])))
    texts = request.segments(lambda ids: SECRET if list(ids) == [7] else "?")
    assert any(SECRET in segment.text for segment in texts)


@pytest.mark.parametrize("path", ["content[].type", "role", "content"])
def test_what_the_table_says_of_messages_holds_for_all_roles(path: str) -> None:
    for role in ("system", "developer", "user", "tool", "function", "assistant"):
        message = {"role": role, "content": [{"type": "text", "text": SECRET}]}
        message |= {"name": "f"} if role == "function" else {}
        request = sent(CHAT, {"model": "m", "messages": [message]})
        assert SECRET in [segment.text for segment in request.segments()]


@pytest.mark.parametrize(("route", "path"), DENIED)
def test_denied_fields_are_refused_for_the_reason_given(route: str, path: str) -> None:
    row = FIELDS[route][path]
    for value in row.harmless:  # what stands for their absence
        sent(route, body_with(route, path, value))
    with pytest.raises(RequestError) as caught:
        sent(route, body_with(route, path, True))
    assert caught.value.status == 400
    if not row.harmless and not path.startswith("messages[].content[]."):
        assert caught.value.param == path.replace("[]", "[0]")
        assert row.why in str(caught.value)


@pytest.mark.parametrize("route", ENDPOINTS)
def test_stripped_fields_are_neither_sent_on_nor_kept(route: str) -> None:
    plain = body_with(route, "temperature", 0.50)
    values = {"user": SECRET, "metadata": {"a": SECRET}}
    request = sent(route, plain | {name: values[name] for name in stripped(route)})
    assert stripped(route)
    assert SECRET not in request.body.decode() + json.dumps(request.raw)
    assert json.loads(request.body) == request.raw == plain


def test_other_fields_keep_their_bytes_when_one_is_stripped() -> None:
    kept = b'"temperature": 0.50, "messages" :[{"content":"\\u00e9 \xc3\xa9","role":"user"} ]'
    request = parse_request(CHAT, b' {"model":"m", "user":"u", ' + kept + b"}\n")
    for value in (b"0.50", b'[{"content":"\\u00e9 \xc3\xa9","role":"user"} ]'):
        assert value in request.body
    whole = b' {"model":"m", ' + kept + b"}\n"
    assert parse_request(CHAT, whole).body == whole


def test_reasons_are_those_of_the_route_or_of_another() -> None:
    assert why_denied(CHAT, "messages[3].task") == FIELDS[CHAT]["messages[].task"].why
    assert why_denied(TEXT, "documents") == FIELDS[CHAT]["documents"].why
    assert why_denied(TEXT, "tools") == why_denied(CHAT, "nonsense")
    assert set(STEERING) <= FIELDS[CHAT].keys() & FIELDS[TEXT].keys()


# --- What the docs say ---------------------------------------------------------------------------

_ROW = re.compile(r"^\| (`[^|]+`) \| (\w+) \|", re.M)
_NAME = re.compile(r"`([^`]+)`")


def documented(heading: str) -> dict[str, str]:
    """Treatment by field, of the table below a heading."""
    text = DOCS.read_text().partition(f"**{heading}**")[2]
    table = re.split(r"\n\n(?!\|)", text.lstrip(), maxsplit=1)[0]
    return {name: row[2] for row in _ROW.finditer(table) for name in _NAME.findall(row[1])}


def test_the_docs_list_every_field_with_its_treatment() -> None:
    found: dict[str, dict[str, str]] = {"Both routes": {}, "Messages": {}, "Chat only": {}}
    found["Completions only"] = {}
    for route, own in ((CHAT, "Chat only"), (TEXT, "Completions only")):
        for path, row in FIELDS[route].items():
            in_both = all(FIELDS[one].get(path) == row for one in ENDPOINTS)
            name = path.removeprefix("messages[].")
            heading = "Both routes" if in_both else own if name == path else "Messages"
            if not is_refused(row):
                found[heading][name] = row.treatment
    for heading, fields in found.items():
        assert documented(heading) == fields


def test_the_docs_list_every_denied_field() -> None:
    text = DOCS.read_text().partition("**Refused**")[2].partition("\n\n**")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|$", text, re.M)
    found = {name: why.strip() for names, why in rows for name in _NAME.findall(names)}
    denied = {
        path: row.why
        for route in ENDPOINTS
        for path, row in FIELDS[route].items()
        if is_refused(row)
    }
    assert found == denied


def is_refused(row: Field) -> bool:
    return row.treatment == "deny" and not row.harmless
