"""`unlearn-guard serve` in a process of its own, in front of a fake vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from guard.bundle import BundleStore
from guard.keys import GuardKey
from tests.product import COMMAND, free_port
from tests.server.fake_vllm import FakeVllm
from tests.server.proxy_fakes import eventually


@dataclass
class Served:
    """A running server, and how to ask it."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    http: httpx.Client

    def ready(self) -> httpx.Response | None:
        """Ask on a connection of its own; None if there is nobody."""
        try:
            return httpx.get(f"{self.url}/ready", timeout=10)
        except httpx.TransportError:
            return None

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        answer = self.ready()
        return answer is not None and answer.status_code == 200

    def workers(self) -> list[int]:
        """Return the ids of the processes that the server has started."""
        return children(self.process.pid)


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Say if a process runs; one that has ended and that nobody asks about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def served(
    store: BundleStore,
    key: GuardKey,
    folder: Path,
    fakes: list[FakeVllm],
    *arguments: str,
    **settings: object,
) -> Iterator[Served]:
    """Serve until the block ends; the fake engines take no self-check."""
    port, log = free_port(), folder / "serve.log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UNLEARN_GUARD_")}
    settings = {
        "key": b64encode(key._secret).decode(),
        "self_check": "false",
        "ledger": folder / "ledger.jsonl",
        **settings,
    }
    environment |= {f"UNLEARN_GUARD_{k.upper()}": str(v) for k, v in settings.items()}
    upstream = ",".join(fake.url for fake in fakes)
    command = [COMMAND, "serve", "--engine", "vllm", "--upstream", upstream]
    command += ["--bundle", str(store.root), "--port", str(port), *arguments]
    with log.open("wb") as output, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
        made = Served(process, f"http://127.0.0.1:{port}", log, client)
        try:
            assert eventually(made.is_ready, 120), log.read_text()
            yield made
        finally:
            if process.poll() is None:
                for one in made.workers():
                    os.kill(one, signal.SIGKILL)
                process.kill()
            process.wait(20)
