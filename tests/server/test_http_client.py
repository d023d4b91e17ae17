"""The HTTP client: what servers may do to it, and what it may do to them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.engines.http_client import HttpClient
from server.engines.http_connection import (
    MOST_HEADERS,
    MOST_WAITING,
    Answer,
    BrokenOff,
    ConnectTimeout,
    ReadTimeout,
)

Behaviour = Callable[["Server", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Server:
    """Answers each request as it is told to, and counts."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.connections = self.requests = self.open = 0
        self.heads: list[bytes] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                self.requests += 1
                await self.behaviour(self, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


def says(*pieces: bytes | float, close: bool = False) -> Behaviour:
    """Write bytes, wait for so many seconds, …"""

    async def behaviour(_: Server, __: Any, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            else:
                await asyncio.sleep(piece)
        if close:
            raise ConnectionError

    return behaviour


def in_turn(*behaviours: Behaviour) -> Behaviour:
    async def behaviour(server: Server, reader: Any, writer: Any) -> None:
        place = min(server.requests, len(behaviours)) - 1
        await behaviours[place](server, reader, writer)

    return behaviour


@asynccontextmanager
async def serving(
    behaviour: Behaviour, *, tls: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[tuple[Server, HttpClient]]:
    server = Server(behaviour)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.port = listening.sockets[0].getsockname()[1]
    scheme = "https" if tls else "http"
    client = HttpClient(f"{scheme}://127.0.0.1:{server.port}", **options)
    try:
        yield server, client
    finally:
        await client.close()
        listening.close()
        for _ in range(100):
            if not server.open:
                break
            await asyncio.sleep(0.01)
        assert not server.open, "a connection was left open"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[None]]], None]:
    """Run a test on an event loop; both that engines are used on."""

    def runs(test: Callable[[], Awaitable[None]]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(test(), 20))

    return runs


Run = Callable[[Callable[[], Awaitable[None]]], None]


async def whole(answer: Answer) -> bytes:
    found = b""
    while piece := await answer.piece():
        found += piece
    return found


async def get(client: HttpClient, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    answer = await client.request("GET", "/a", None, headers or {})
    return answer.status, await whole(answer)


# --- Answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "close", "body"),
    [
        ([OK], False, b"ok"),
        ([OK[:20], OK[20:-1], OK[-1:]], False, b"ok"),
        ([CHUNKED, b"2\r\nok\r\n", b"0\r\n\r\n"], False, b"ok"),
        ([b"HTTP/1.1 200 OK\r\n\r\no", b"k"], True, b"ok"),
        ([b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok"], True, b"ok"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", OK], False, b"ok"),
        ([b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK], False, b"ok"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], False, b""),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], False, b""),
    ],
)
def test_an_answer_is_read_however_it_is_framed(
    run: Run, pieces: list[bytes], close: bool, body: bytes
) -> None:
    async def test() -> None:
        paused = [one for piece in pieces for one in (piece, 0.005)]
        async with serving(says(*paused, close=close)) as (server, client):
            for _ in range(2):
                answer = await client.request("GET", "/a", None, {})
                assert answer.status in (200, 204)
                assert all(name != "link" for name, _ in answer.headers)
                assert await whole(answer) == body
            assert server.connections == (2 if close else 1)

    run(test)


@pytest.mark.parametrize(
    "said",
    [
        b"SMTP ready\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * (MOST_HEADERS + 1) + b"\r\n\r\n",
    ],
    ids=["no HTTP", "another protocol", "two lengths", "endless headers"],
)
def test_what_is_no_answer_breaks_off(run: Run, said: bytes) -> None:
    async def test() -> None:
        async with serving(in_turn(says(said, 0.05), says(OK))) as (_, client):
            with pytest.raises(BrokenOff):
                await get(client)
            assert await get(client) == (200, b"ok")

    run(test)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok",
        CHUNKED + b"2\r\nok\r\n",
        CHUNKED + b"2\r\nok\r\nzz\r\n",
    ],
)
def test_what_had_come_is_given_before_the_fault(run: Run, said: bytes) -> None:
    async def test() -> None:
        async with serving(says(said, close=True)) as (_, client):
            answer = await client.request("GET", "/a", None, {})
            assert await answer.piece() == b"ok"
            for _ in range(2):
                with pytest.raises(BrokenOff):
                    await answer.piece()

    run(test)


# --- Connections that are kept -------------------------------------------------------------------


def test_a_connection_serves_one_request_after_another(run: Run) -> None:
    async def test() -> None:
        async with serving(says(OK)) as (server, client):
            for _ in range(5):
                assert await get(client) == (200, b"ok")
            assert (server.connections, server.requests) == (1, 5)
            await asyncio.gather(*(get(client) for _ in range(5)))
            assert server.connections == 5

    run(test)


def test_a_connection_that_was_idle_for_long_is_closed(run: Run) -> None:
    async def test() -> None:
        async with serving(says(OK), keep_s=0.05) as (server, client):
            await get(client)
            await asyncio.sleep(0.2)
            assert server.open == 0
            assert await get(client) == (200, b"ok")
            assert server.connections == 2

    run(test)


@pytest.mark.parametrize(
    "pieces",
    [[OK + OK], [OK, 0.02, OK, 0.05], [OK, 0.02, b"x", 0.05]],
    ids=["at once", "late", "no HTTP"],
)
def test_an_answer_that_nobody_asked_for_answers_nothing(run: Run, pieces: list[Any]) -> None:
    async def test() -> None:
        async with serving(in_turn(says(*pieces), says(OK.replace(b"ok", b"42")))) as (_, client):
            assert await get(client) == (200, b"ok")
            await asyncio.sleep(0.05)
            assert await get(client) == (200, b"42")

    run(test)


def test_a_request_that_is_cancelled_when_its_answer_has_come_leaves_the_others_alone(
    run: Run,
) -> None:
    """Its connection may serve another by then."""

    async def test() -> None:
        async with serving(says(OK)) as (server, client):
            await get(client)
            loop, (connection,) = asyncio.get_running_loop(), client._idle
            first = loop.create_task(get(client))
            await asyncio.sleep(0)
            second: list[asyncio.Task[tuple[int, bytes]]] = []
            real = connection.data_received

            def received(data: bytes) -> None:
                if not second:  # it begins when the answer is whole, before its task is told
                    second.append(loop.create_task(get(client)))
                    real(data)
                    first.cancel()
                else:
                    real(data)

            connection.data_received = received  # type: ignore[method-assign]
            assert connection._transport is not None
            connection._transport.set_protocol(connection)  # uvloop remembers the method
            await asyncio.wait({first})
            assert await second[0] == (200, b"ok")
            assert server.connections == 1

    run(test)


def test_no_more_connections_than_allowed_and_each_request_has_its_turn(run: Run) -> None:
    async def test() -> None:
        async with serving(says(0.01, OK), max_connections=3) as (server, client):
            assert await asyncio.gather(*(get(client) for _ in range(12))) == [(200, b"ok")] * 12
            assert server.connections <= 3
            waiting = [asyncio.ensure_future(get(client)) for _ in range(6)]
            await asyncio.sleep(0.002)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            assert await asyncio.gather(*(get(client) for _ in range(6))) == [(200, b"ok")] * 6

    run(test)


# --- Time ----------------------------------------------------------------------------------------


def test_silence_is_a_timeout(run: Run) -> None:
    async def test() -> None:
        half = CHUNKED + b"2\r\nok\r\n"
        async with serving(in_turn(says(0.5), says(half, 0.5), says(OK)), read_timeout_s=0.2) as (
            _,
            client,
        ):
            with pytest.raises(ReadTimeout):
                await get(client)
            answer = await client.request("GET", "/a", None, {})
            assert await answer.piece() == b"ok"
            with pytest.raises(ReadTimeout):
                await answer.piece()
            assert await get(client) == (200, b"ok")

    run(test)


def test_an_answer_may_take_longer_than_each_of_its_pieces(run: Run) -> None:
    async def test() -> None:
        pieces: list[Any] = [CHUNKED, *[0.1, b"1\r\nx\r\n"] * 5, b"0\r\n\r\n"]
        async with serving(says(*pieces), read_timeout_s=0.3) as (_, client):
            assert await get(client) == (200, b"x" * 5)
            await asyncio.sleep(0.4)  # the timer finds nothing to do
            assert await get(client) == (200, b"x" * 5)

    run(test)


def test_no_connection_in_time_is_told_from_no_answer(run: Run) -> None:
    async def test() -> None:
        client = HttpClient("http://192.0.2.1:9", connect_timeout_s=0.05)

        async def never(*_: Any, **__: Any) -> Any:
            await asyncio.sleep(30)

        client._loop.create_connection = never  # type: ignore[method-assign]
        for _ in range(3):
            with pytest.raises(ConnectTimeout):
                await get(client)
        await client.close()

    with asyncio.Runner() as runner:
        runner.run(test())


# --- Bodies --------------------------------------------------------------------------------------


def test_an_engine_waits_for_a_reader_that_is_slow(run: Run) -> None:
    """And its silence meanwhile is no timeout."""
    size = 40 * MOST_WAITING

    async def test() -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size
        async with serving(says(head, b"x" * size), read_timeout_s=0.2) as (_, client):
            answer = await client.request("GET", "/a", None, {})
            await asyncio.sleep(0.6)
            held = sum(map(len, answer._pieces))
            assert MOST_WAITING < held < 4 * MOST_WAITING
            assert len(await whole(answer)) == size
            assert await get(client) == (200, b"x" * size)

    run(test)


def test_an_answer_before_the_end_of_a_long_body_ends_the_sending(run: Run) -> None:
    async def test() -> None:
        async with serving(says(OK, 0.05)) as (server, client):
            body = b"x" * 50_000_000
            answer = await client.request("POST", "/a", body, {})
            assert (answer.status, await whole(answer)) == (200, b"ok")
            assert await get(client) == (200, b"ok")
            assert server.connections == 2

    run(test)


def test_closing_an_answer_closes_its_connection_and_frees_its_place(run: Run) -> None:
    async def test() -> None:
        endless = in_turn(says(CHUNKED + b"1\r\nx\r\n", 0.3), says(OK))
        async with serving(endless, max_connections=1) as (server, client):
            answer = await client.request("GET", "/a", None, {})
            assert await answer.piece() == b"x"
            answer.close()
            answer.close()
            assert await get(client) == (200, b"ok")
            assert server.connections == 2

    run(test)


# --- Requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a\r\nx: y", "a\n", "a\r", "a\0b"])
@pytest.mark.parametrize("in_name", [False, True])
def test_a_header_can_hold_no_other(run: Run, value: str, in_name: bool) -> None:
    async def test() -> None:
        async with serving(says(OK)) as (server, client):
            with pytest.raises(ValueError, match="end of a line"):
                await get(client, {value: "v"} if in_name else {"x": value})
            assert server.requests == 0
            assert await get(client, {"x": "ä"}) == (200, b"ok")
            assert "x: ä\r\n".encode("latin-1") in server.heads[0]

    run(test)


def test_requests_name_host_path_and_length(run: Run) -> None:
    async def test() -> None:
        async with serving(says(OK)) as (server, _):
            client = HttpClient(f"http://localhost:{server.port}/deep/")
            await whole(await client.request("POST", "/v1?x=1", b"", {"accept": "a"}))
            await client.close()
            first, *lines = server.heads[0].split(b"\r\n")
        assert first == b"POST /deep/v1?x=1 HTTP/1.1"
        host = b"host: localhost:%d" % server.port
        assert lines == [host, b"accept: a", b"content-length: 0", b"", b""]

    run(test)


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def test_tls_is_spoken_with_those_who_are_trusted(
    run: Run, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate)

    async def test() -> None:
        async with serving(says(OK), tls=own) as (server, client):
            with pytest.raises(ssl.SSLCertVerificationError):
                await get(client)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            trusting = HttpClient(f"https://127.0.0.1:{server.port}")
            assert await get(trusting) == (200, b"ok")
            assert await get(trusting) == (200, b"ok")
            await trusting.close()
            elsewhere = HttpClient(f"https://localhost:{server.port}")
            with pytest.raises(ssl.SSLCertVerificationError):
                await get(elsewhere)
            await elsewhere.close()

    run(test)
