"""`on_error`: one setting, one place that acts on it, the same on every route."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from guard.cli_compose import server_options
from guard.settings import load_settings
from server.types import ServerOptions
from tests.server.proxy_fakes import CHAT, TEXT, live

ROOT = Path(__file__).parents[2]
SETTING = "on_error"
READERS = {
    "guard/cli_compose.py": 1,  # from the settings to the server's options
    "guard/live_settings.py": 1,  # names it, as one that may change while serving
    "server/proxy.py": 1,  # acts on it
}
ROUTES: dict[str, Any] = {
    CHAT: lambda text: {"model": "m", "messages": [{"role": "user", "content": text}]},
    TEXT: lambda text: {"model": "m", "prompt": text},
    "/v1/messages": lambda text: {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": text}],
    },
    "/v1/responses": lambda text: {"model": "m", "input": text},
    "/v1/embeddings": lambda text: {"model": "m", "input": text},
}


def reads(file: Path) -> int:
    """How often a file reads the setting, by attribute or by name."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    attributes = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr == SETTING]
    names = [n for n in nodes if isinstance(n, ast.Constant) and n.value == SETTING]
    return len(attributes) + len(names)


def test_it_is_read_in_one_place() -> None:
    files = [file for top in ("guard", "server") for file in (ROOT / top).rglob("*.py")]
    found = {file.relative_to(ROOT).as_posix(): count for file in files if (count := reads(file))}
    assert found == READERS


@pytest.mark.parametrize("value", ["refuse", "pass"])
def test_the_setting_reaches_the_server(value: str) -> None:
    settings = load_settings({SETTING: value}, environ={}).values
    assert server_options(settings).on_error == value
    assert server_options(load_settings(environ={}).values).on_error == "refuse"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("on_error", "status", "sent"), [("refuse", 503, 0), ("pass", 200, 1)])
def test_it_means_the_same_on_every_route(
    route: str, on_error: Any, status: int, sent: int
) -> None:
    with live(ServerOptions(on_error=on_error, embeddings="pass")) as app:
        answer = app.http.post(route, json=ROUTES[route]("broken"))
    assert (answer.status_code, len(app.engine.posts)) == (status, sent), answer.text


@pytest.mark.parametrize("text", ["a garbled text", "unread", "forbidden", "a sealed wizard"])
def test_what_was_decided_is_not_let_through_by_it(text: str) -> None:
    with live(ServerOptions(on_error="pass")) as app:
        assert app.ask(text).status_code == 400
        app.guard.rewrite_fails = app.guard.ledger_fails = True
        assert app.ask("a wizard").status_code == 503
        assert not app.engine.posts
