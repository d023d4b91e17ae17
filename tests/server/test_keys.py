"""API keys: only hashes are kept, each has limits of its own, and the file is followed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from guard.cli import run
from guard.cli_compose import server_options
from guard.errors import ConfigError
from guard.settings import load_settings
from server.app import create_app
from server.engines.vllm import VllmEngine
from server.errors import ApiErrorRaised
from server.keys import KeyRing, hash_key, new_key, read_keys
from server.types import ServerOptions
from tests.server.fake_vllm import fake_vllm
from tests.server.observed import headers, observed
from tests.server.proxy_fakes import CHAT, WordGuard, chat, error_of, eventually, running

PLAIN = "a plain key"


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps(list(entries)))  # JSON is YAML
    return path


def entry(key: str, name: str = "alice", **limits: int) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **limits}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def ask(http: httpx.Client, key: str | None = None, text: str = "hello") -> httpx.Response:
    return http.post(CHAT, json=chat(text), headers=headers(key))


# --- Who may ask ---------------------------------------------------------------------------------


def test_a_listed_key_is_accepted_in_either_header_and_nothing_else_is(file: Path) -> None:
    key = new_key()
    ring = KeyRing(file=write(file, entry(key)))
    assert key not in file.read_text()
    with observed(ring) as (_, http):
        assert ask(http, key).status_code == 200
        assert http.post(CHAT, json=chat(), headers={"x-api-key": key}).status_code == 200
        hashed = hash_key(key)
        for wrong in (None, "k", hashed, key[:-1], key + "x", key.upper()):
            response = ask(http, wrong)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        basic = http.post(CHAT, json=chat(), headers={"authorization": f"Basic {key}"})
        assert basic.status_code == 401


def test_plain_keys_and_listed_ones_stand_beside_each_other(file: Path) -> None:
    with observed(KeyRing([PLAIN], write(file, entry("k1")))) as (_, http):
        assert [ask(http, key).status_code for key in (PLAIN, "k1", "k2")] == [200, 200, 401]


def test_without_keys_everyone_may_ask_but_an_empty_file_lets_nobody_in(file: Path) -> None:
    with observed(KeyRing()) as (_, http):
        assert ask(http).status_code == 200
    file.write_text("# all were revoked\n")
    with observed(KeyRing(file=file)) as (_, http):
        assert ask(http).status_code == 401
        for empty in ({"x-api-key": ""}, {"authorization": "Bearer"}):
            assert http.post(CHAT, json=chat(), headers=empty).status_code == 401


# --- Limits of a key -----------------------------------------------------------------------------


def test_requests_a_minute_end_in_429_that_openais_client_knows(file: Path) -> None:
    ring = KeyRing(file=write(file, entry("k1", requests_per_minute=3), entry("k2", "bob")))
    with observed(ring) as (_, http):
        assert [ask(http, "k1").status_code for _ in range(4)] == [200, 200, 200, 429]
        response = ask(http, "k1")
        error = error_of(response)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert response.headers["retry-after"] == "20"
        assert ask(http, "k2").status_code == 200  # another's requests don't count
        client = openai.OpenAI(
            base_url=f"{str(http.base_url).rstrip('/')}/v1",
            api_key="k1",
            max_retries=0,
            http_client=http,
        )
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="m", messages=chat()["messages"])


class _Clock(asyncio.SelectorEventLoop):
    """A loop whose time can be put forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


def test_retry_after_is_long_enough_and_not_much_too_long(file: Path) -> None:
    ring = KeyRing(file=write(file, entry("k1", requests_per_minute=4)))
    scope = {"headers": [(b"authorization", b"Bearer k1")]}
    loop = _Clock()

    async def attempt() -> int | None:
        try:
            async with ring.admit(scope):
                return None
        except ApiErrorRaised as error:
            return error.error.retry_after_s

    async def main() -> None:
        assert [await attempt() for _ in range(4)] == [None] * 4
        wait = await attempt()
        assert wait == 15
        loop.ahead += wait - 1
        assert await attempt() == wait  # and what was refused has not been counted
        loop.ahead += 1
        assert [await attempt(), await attempt()] == [None, wait]
        loop.ahead += 60
        assert [await attempt() for _ in range(5)] == [None] * 4 + [wait]

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


def test_requests_at_one_time_are_limited_until_one_ends(file: Path) -> None:
    with observed(KeyRing(file=write(file, entry("k1", concurrent=1)))) as (app, http):
        app.gate.clear()
        found: list[int] = []
        first = threading.Thread(target=lambda: found.append(ask(http, "k1").status_code))
        first.start()
        assert eventually(lambda: app.waiting == 1)
        response = ask(http, "k1")
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert error_of(response)["code"] == "rate_limit_exceeded"
        app.open_gate()
        first.join(20)
        assert found == [200]
        assert ask(http, "k1").status_code == 200


def test_a_client_that_left_does_not_keep_its_place(file: Path) -> None:
    with observed(KeyRing(file=write(file, entry("k1", concurrent=1)))) as (app, http):
        app.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            http.post(CHAT, json=chat(), headers=headers("k1"), timeout=0.5)
        app.open_gate()
        assert eventually(lambda: ask(http, "k1").status_code == 200)


def test_a_keys_own_limit_of_the_body(file: Path) -> None:
    ring = KeyRing(file=write(file, entry("k1", max_body_bytes=1_000), entry("k2", "bob")))
    with observed(ring) as (_, http):
        text = "a" * 1_000
        assert [ask(http, key, text).status_code for key in ("k1", "k2")] == [413, 200]
        assert ask(http, "k1").status_code == 200


# --- The file ------------------------------------------------------------------------------------


def test_the_file_is_followed_without_a_restart(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with observed(KeyRing(file=write(file, entry("k1")))) as (_, http):

        def told(words: str) -> bool:
            return ask(http, "k2").status_code == 200 and words in caplog.text

        assert [ask(http, key).status_code for key in ("k1", "k2")] == [200, 401]
        write(file, entry("k2", "bob"))
        assert eventually(lambda: ask(http, "k2").status_code == 200)
        assert ask(http, "k1").status_code == 401
        with caplog.at_level(logging.ERROR, "unlearn_guard.keys"):
            file.write_text("- name: [")
            assert eventually(lambda: told("keys stay as they were"))
            assert ask(http, "k2").status_code == 200
            os.unlink(file)
            assert eventually(lambda: told("can't be read"))
        assert ask(http, "k2").status_code == 200  # nobody is let in or shut out by an accident
        write(file)
        assert eventually(lambda: ask(http, "k2").status_code == 401)


HASH = hash_key("x")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"- {{name: a, sha256: '{HASH}', rpm: 3}}", r"entry 1: .*unknown field `rpm`"),
        ("- {name: a, key: secret}", r"entry 1: .*unknown field `key`"),
        ("- {name: a}", "missing required field `sha256`"),
        (f"- {{name: a, sha256: '{HASH[:-1]}'}}", "sha256"),
        (f"- {{name: a, sha256: '{HASH.upper()}'}}", "sha256"),
        (f"- {{name: 'a b', sha256: '{HASH}'}}", r"\$.name"),
        (f'- {{name: "a\\n", sha256: "{HASH}"}}', r"\$.name"),
        (f"- {{name: a, sha256: '{HASH}', concurrent: 0}}", "concurrent"),
        (f"- {{name: a, sha256: '{HASH}', requests_per_minute: 1.5}}", "requests_per_minute"),
        (f"- {{name: a, sha256: '{HASH}', requests_per_minute: true}}", "requests_per_minute"),
        (f"- {{name: a, name: b, sha256: '{HASH}'}}", "given twice near line 1"),
        (f"- {{name: a, sha256: '{HASH}'}}\n" * 2, r"entry 2: the name 'a' is given twice"),
        (
            f"- {{name: a, sha256: '{HASH}'}}\n- {{name: b, sha256: '{HASH}'}}",
            r"entry 2: 'b' has the key of 'a'",
        ),
        (f"- {{name: a, sha256: '{hashlib.sha256().hexdigest()}'}}", "empty key"),
        ("keys: []", "expected a list"),
        ("- !!python/object:os.system {}", "not valid YAML"),
        ("- [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_and_says_where(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        KeyRing(file=file)
    assert str(file) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_files_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        KeyRing(file=file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        KeyRing(file=file)
    with pytest.raises(ConfigError, match="empty key"):
        KeyRing([""])


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet_surroundings")
def test_key_new_prints_the_key_once_and_appends_its_hash(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("# ours\n- {name: old, sha256: " + f"'{HASH}'" + "}")
    words = ["key", "new", "--name", "alice", "--requests-per-minute", "5", "--concurrent", "2"]
    assert run([*words, "--file", str(file)]) == 0
    printed = capsys.readouterr()
    key = printed.out.strip()
    assert len(key) > 40
    assert key not in printed.err + file.read_text()
    assert file.read_text().startswith("# ours\n")
    old, new = read_keys(file)
    assert (old.name, new.name, new.sha256) == ("old", "alice", hash_key(key))
    assert (new.requests_per_minute, new.concurrent, new.max_body_bytes) == (5, 2, None)
    monkeypatch.setenv("UNLEARN_GUARD_API_KEYS_FILE", str(file))
    assert run(["key", "new", "--name", "bob"]) == 0
    assert capsys.readouterr().out.strip() != key
    assert run(["key", "list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["old", "alice", "bob"]


@pytest.mark.usefixtures("quiet_surroundings")
@pytest.mark.parametrize(
    ("name", "before", "told"),
    [
        ("alice", f"- {{name: alice, sha256: '{HASH}'}}\n", "given twice"),
        ("two words", "", "--name"),
        ('a"', "", "--name"),
        ("alice", "keys: []\n", "expected a list"),
        ("alice", f"[{{name: bob, sha256: '{HASH}'}}]\n", "not valid YAML"),
    ],
)
def test_key_new_leaves_a_file_alone_that_it_cannot_extend(
    file: Path, capsys: pytest.CaptureFixture[str], name: str, before: str, told: str
) -> None:
    file.write_text(before)
    assert run(["key", "new", "--name", name, "--file", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err
    assert file.read_text() == before


@pytest.mark.usefixtures("quiet_surroundings")
def test_key_commands_want_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["key", "new", "--name", "alice"]) == 2
    assert "api_keys_file" in capsys.readouterr().err


# --- Left to the engine --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "status"),
    [
        ({"authorization": "Bearer client"}, 200),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": ""}, 401),
        ({}, 401),
    ],
)
def test_an_engine_that_asks_for_keys_sees_the_clients_and_never_ours(
    shown: dict[str, str], status: int
) -> None:
    options = ServerOptions(forward_authorization=True)
    with fake_vllm() as fake:
        fake.keys = {"Bearer ours", "Bearer client"}
        engine = VllmEngine(fake.url, api_key="ours")
        with running(create_app(WordGuard(), engine, options)) as url:
            assert httpx.get(f"{url}/ready").status_code == 200
            answer = httpx.post(f"{url}{CHAT}", json=chat(), headers=shown)
    assert (answer.status_code, len(fake.posts)) == (status, int(status == 200))


def test_an_engine_that_asks_for_none_cannot_be_left_to_decide_who_may_ask() -> None:
    settings = load_settings({"forward_authorization": True}, environ={}).values
    with pytest.raises(ConfigError, match="embedded engine lets everyone in"):
        server_options(settings)
    vllm = {"forward_authorization": True, "engine": "vllm"}
    assert server_options(load_settings(vllm, environ={}).values).forward_authorization
