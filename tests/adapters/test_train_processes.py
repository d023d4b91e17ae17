"""Two processes that train one adapter together, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.adapter_files import CONFIG, WEIGHTS
from adapters.examples import Example
from adapters.orthogonal import EarlierAdapters, Orthogonality
from adapters.processes import Alone, find_processes
from adapters.train import REPORT, TrainSettings, read_training, train_lora

# Answers of one length: a loss that is a mean over tokens is then the mean of its parts'.
# Five in batches of four: in each epoch's last step one process has nothing of its own.
EXAMPLES = [Example((1, 10 + n, 5), (20 + 3 * n, 30 + n, 40, 2)) for n in range(5)]
SETTINGS = TrainSettings(
    rank=3, alpha=6, epochs=3, batch=4, rate=1e-2, checkpoint_every=4, validate_every=2,
    dtype="float32",
)  # fmt: skip


def train(out: Path, earlier: Path) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    return train_lora(
        LlamaForCausalLM(config),
        EXAMPLES,
        SETTINGS,
        out,
        constraint=Orthogonality(EarlierAdapters.read([earlier] if earlier.exists() else [])),
        validation=lambda network: float(network(input_ids=torch.tensor([[1, 9]])).logits.std()),
    )


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    first, one, two = tmp_path / "first", tmp_path / "one", tmp_path / "two"
    train(first, tmp_path / "none")
    train(one, first)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(two), str(first)],
            env=os.environ
            | {"WORLD_SIZE": "2", "RANK": str(n), "LOCAL_RANK": str(n), "MASTER_ADDR": "127.0.0.1"}
            | {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors

    alone, together = read_training(one), read_training(two)
    assert alone is not None and together is not None
    assert together.losses == pytest.approx(alone.losses, abs=1e-4)
    assert together.best_step == alone.best_step
    wanted, found = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert max(float((found[n] - wanted[n]).abs().max()) for n in wanted) < 1e-4
    assert max(float((load_file(first / WEIGHTS)[n] - wanted[n]).abs().max()) for n in wanted) > 0.1
    assert (one / CONFIG).read_bytes() == (two / CONFIG).read_bytes()
    assert {path.name for path in two.iterdir()} == {CONFIG, WEIGHTS, REPORT}


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, rank in ((None, None), ("1", "0"), ("4", None)):
        for name, value in (("WORLD_SIZE", size), ("LOCAL_RANK", rank)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        assert isinstance(find_processes(), Alone)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
