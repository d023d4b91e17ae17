"""A real vLLM for the tests: started once, stopped with its children at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PYTHON_VARIABLE = "GUARD_TEST_VLLM_PYTHON"
SERVED_NAME = "smollm2"
START_LIMIT_S = 600
STOP_LIMIT_S = 30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs vLLM, and the first test waits for its start."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(START_LIMIT_S + 1800))


@pytest.fixture(scope="session")
def vllm_url(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a vLLM that serves SmolLM2 with prompt embeddings and LoRA."""
    with started_vllm(smollm2_dir, tmp_path_factory.mktemp("vllm") / "vllm.log") as url:
        yield url


@pytest.fixture(scope="module")
def second_vllm_url(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of another one beside it, for the module that asks; it takes memory and a minute."""
    with started_vllm(smollm2_dir, tmp_path_factory.mktemp("second") / "vllm.log") as url:
        yield url


@contextmanager
def started_vllm(
    model: Path, log: Path, port: int | None = None, without: str = ""
) -> Iterator[str]:
    """Run a vLLM until the block ends; yields its URL once it is ready.

    Args:
        model: The model's directory.
        log: File for what it prints.
        port: Where it listens; None takes a free one.
        without: `--enable-lora`, or a variable of its environment, to leave out.
    """
    python = os.environ.get(PYTHON_VARIABLE)
    if not python or not Path(python).is_file():
        pytest.fail(
            f"set {PYTHON_VARIABLE} to the python of an environment with vLLM's CPU build (got "
            f"{python!r}); `make test-vllm` installs one and does so",
            pytrace=False,
        )
    port = port or free_port()
    words = command(python, model, port)
    if without in words:
        words = words[: words.index(without)]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={k: v for k, v in environment().items() if k != without},
            start_new_session=True,
        )
        try:
            wait_until_healthy(process, url, log)
            yield url
        finally:
            stop(process)


def command(python: str, model: Path, port: int) -> list[str]:
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", SERVED_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"),
        "--enable-prompt-embeds",
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--max-num-seqs", "1"),  # the CPU build mixes up adapters within a batch: docs/vllm.md
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "8", "--max-lora-rank", "16"),
        *("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {
        **kept,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"vLLM ended with {process.returncode}:\n{tail(log)}", pytrace=False)
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vLLM was not ready within {START_LIMIT_S} s:\n{tail(log)}", pytrace=False)


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop vLLM and the worker processes of its session."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait(STOP_LIMIT_S)
