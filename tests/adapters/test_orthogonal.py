"""Keeping adapters apart: subspaces read from files, the penalty, projection, and shared room."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from adapters.adapter_files import WEIGHTS
from adapters.examples import Example
from adapters.orthogonal import (
    EarlierAdapters,
    Mode,
    Orthogonality,
    Sides,
    kept_apart,
    largest_cosine,
    subspace_cosine,
)
from adapters.train import TrainSettings, train_lora
from guard.errors import ArtifactError, ConfigError, IncompatibleArtifactError

RANK = 2
EXAMPLES = [Example((1, 10 + n, 5), (20 + 3 * n, 30 + n, 40, 2)) for n in range(4)]
SETTINGS = TrainSettings(
    rank=RANK, alpha=4, epochs=4, batch=2, rate=1e-2, modules=("q_proj", "v_proj"), dtype="float32"
)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config)


def adapted(rank: int = RANK) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():  # peft and transformers warn of one another
        warnings.simplefilter("ignore")
        return get_peft_model(tiny(), config)


def write(folder: Path, rows: Tensor, columns: Tensor, layer: str = Q0) -> Path:
    folder.mkdir(parents=True)
    tensors = {f"{layer}.lora_A.weight": rows, f"{layer}.lora_B.weight": columns}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


def units(*numbers: int, width: int = 32) -> Tensor:
    """Rows of the identity."""
    return torch.eye(width)[list(numbers)]


def in_sequence(root: Path, count: int, **settings: Any) -> list[Path]:
    """Train adapters with one seed, each kept apart from those before it."""
    folders: list[Path] = []
    for number in range(count):
        constraint = Orthogonality(EarlierAdapters.read(folders), **settings)
        out = root / str(number)
        train_lora(tiny(), EXAMPLES, SETTINGS, out, constraint=constraint)
        folders.append(out)
    return folders


def overlap(folders: list[Path], side: str) -> float:
    """Return the largest |product| of the last adapter's rows with unit rows of the others."""
    letter = "A" if side == "input" else "B"
    *before, last = [load_file(folder / WEIGHTS) for folder in folders]
    worst = 0.0
    for name in last:
        if f"lora_{letter}" in name:
            for other in before:
                rows = [one if letter == "A" else one.T for one in (last[name], other[name])]
                unit = rows[1] / rows[1].norm(dim=1, keepdim=True).clamp_min(1e-9)
                worst = max(worst, float((rows[0] @ unit.T).abs().max()))
    return worst


# --- Subspaces -----------------------------------------------------------------------------------


def test_cosines_are_those_of_the_principal_angles(tmp_path: Path) -> None:
    angle = 0.3
    tilted = torch.cos(torch.tensor(angle)) * units(0) + torch.sin(torch.tensor(angle)) * units(9)
    one = write(tmp_path / "a", 3 * units(0, 1), units(0, 1).T)
    # The same rows are mixed and scaled: only what they span counts.
    other = write(tmp_path / "b", torch.cat([tilted + units(8), 7 * units(8)]), units(2, 3).T)
    assert subspace_cosine(one, other, "input") == {
        Q0: pytest.approx(float(torch.cos(torch.tensor(angle))), abs=1e-6)
    }
    assert subspace_cosine(one, other, "output") == {Q0: 0.0}
    third = write(tmp_path / "c", units(5, 6), units(1, 4).T)
    assert largest_cosine([one, other, third], "input") == pytest.approx(0.9553365, abs=1e-6)
    assert largest_cosine([one, other, third], "output") == 1.0
    assert largest_cosine([one], "input") == 0.0


def test_a_matrix_of_zeros_spans_nothing(tmp_path: Path) -> None:
    one = write(tmp_path / "a", units(0, 1), torch.zeros(32, 2))
    earlier = EarlierAdapters.read([one])
    assert earlier.bases["output"][Q0][0].shape == (32, 0)
    assert subspace_cosine(one, one, "output") == {Q0: 0.0}
    assert subspace_cosine(one, one, "input") == {Q0: 1.0}


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no adapter in"):
        EarlierAdapters.read([tmp_path / "none"])
    folder = write(tmp_path / "torn", units(0, 1), units(0, 1).T)
    (folder / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="can't be read"):
        EarlierAdapters.read([folder])
    wide = write(tmp_path / "wide", units(0, 1, width=40), units(0, 1).T)
    with pytest.raises(IncompatibleArtifactError, match="another width"):
        Orthogonality(EarlierAdapters.read([wide])).prepare(adapted())
    right = write(tmp_path / "right", units(0, 1), units(0, 1).T)
    with pytest.raises(IncompatibleArtifactError, match="different models"):
        subspace_cosine(wide, right, "input")
    for wrong in ({"mode": "hard"}, {"sides": "A"}, {"weight": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Orthogonality(EarlierAdapters.read([]), **wrong)  # type: ignore[arg-type]


# --- The penalty ---------------------------------------------------------------------------------


def test_penalty_and_gradient_are_the_formulas(tmp_path: Path) -> None:
    """Two earlier adapters, one along axes 0 and 1, one along 1 and 2; one layer has them."""
    earlier = EarlierAdapters.read(
        [
            write(tmp_path / "a", 5 * units(0, 1), units(0, 1).T),
            write(tmp_path / "b", 2 * units(1, 2), units(3, 4).T),
        ]
    )
    network = adapted()
    constraint = Orthogonality(earlier, "penalty", "input", weight=0.1)
    constraint.prepare(network)
    name = f"{Q0}.lora_A.default.weight"
    matrix = dict(network.named_parameters())[name]
    with torch.no_grad():
        matrix.copy_(torch.arange(64.0).reshape(2, 32) / 10)
    penalty = constraint.penalty(network)
    assert penalty is not None
    # Columns 0, 1 (in both adapters) and 2 of rows (0, .1, .2, ...) and (3.2, 3.3, 3.4, ...).
    squares = (0 + 3.2**2) + 2 * (0.1**2 + 3.3**2) + (0.2**2 + 3.4**2)
    assert float(penalty.detach()) == pytest.approx(0.1 * squares, rel=1e-6)
    penalty.backward()  # type: ignore[no-untyped-call]
    wanted = torch.zeros(2, 32)
    wanted[:, 0], wanted[:, 1], wanted[:, 2] = (
        0.2 * matrix.detach()[:, 0],
        0.4 * matrix.detach()[:, 1],
        0.2 * matrix.detach()[:, 2],
    )
    assert matrix.grad is not None
    assert torch.allclose(matrix.grad, wanted, atol=1e-6)


def test_the_penalty_is_the_mean_over_the_layers_of_a_side(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = {}
    for layer in (0, 1):
        name = Q0.replace("layers.0", f"layers.{layer}")
        tensors[f"{name}.lora_A.weight"] = units(0, 1)
        tensors[f"{name}.lora_B.weight"] = units(2, 3).T.contiguous()
    save_file(tensors, folder / WEIGHTS)
    earlier, network = EarlierAdapters.read([folder]), adapted()
    values: dict[Sides, float] = {}
    sides: tuple[Sides, ...] = ("input", "output", "both")
    for side in sides:
        constraint = Orthogonality(earlier, "penalty", side, weight=1.0, starts_apart=False)
        constraint.prepare(network)
        with torch.no_grad():
            for name, value in network.named_parameters():
                if "lora" in name:
                    value.fill_(1.0 if "layers.0" in name else 2.0)
        found = constraint.penalty(network)
        assert found is not None
        values[side] = float(found.detach())
    # Layer 0: 2 x 2 products of 1; layer 1: of 2.
    assert values == {"input": 10.0, "output": 10.0, "both": 20.0}


def test_without_mode_or_earlier_adapters_nothing_is_done(tmp_path: Path) -> None:
    earlier = EarlierAdapters.read([write(tmp_path / "a", units(0, 1), units(0, 1).T)])
    for constraint in (
        Orthogonality(earlier, "none"),
        Orthogonality(EarlierAdapters.read([]), "penalty"),
        Orthogonality(EarlierAdapters.read([]), "project"),
    ):
        network = adapted()
        before = {name: value.clone() for name, value in network.named_parameters()}
        constraint.prepare(network)
        constraint.after_step(network)
        assert constraint.penalty(network) is None
        assert all(torch.equal(before[name], one) for name, one in network.named_parameters())


# --- Starting and projecting ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["penalty", "project"])
def test_a_starts_apart_at_its_scale_and_not_as_others_did(tmp_path: Path, mode: Mode) -> None:
    first = write(tmp_path / "a", units(0, 1), units(0, 1).T)
    second = write(tmp_path / "b", units(1, 2), units(0, 1).T)
    starts = []
    for folders in ([first], [first], [first, second]):
        torch.manual_seed(5)
        network = adapted()
        matrix = dict(network.named_parameters())[f"{Q0}.lora_A.default.weight"]
        length = matrix.detach().norm(dim=1)
        Orthogonality(EarlierAdapters.read(folders), mode).prepare(network)
        start = matrix.detach().clone()
        assert start[:, :2].abs().max() < 1e-6
        assert torch.allclose(start.norm(dim=1), length, rtol=1e-5)
        starts.append(start)
    assert torch.equal(starts[0], starts[1])
    assert starts[2][:, :3].abs().max() < 1e-6
    meeting = torch.linalg.svdvals(
        torch.linalg.qr(starts[0].T).Q.T @ torch.linalg.qr(starts[2].T).Q
    )
    assert meeting.max() < 0.9


def test_projection_is_exact_on_the_sides_asked_for(tmp_path: Path) -> None:
    for sides, apart in (
        ("input", {"input"}),
        ("output", {"output"}),
        ("both", {"input", "output"}),
    ):
        folders = in_sequence(tmp_path / sides, 3, mode="project", sides=sides)
        for side in ("input", "output"):
            if side in apart:
                assert overlap(folders, side) < 1e-5
                assert largest_cosine(folders, side) < 1e-3  # type: ignore[arg-type]
            else:
                assert overlap(folders, side) > 1e-3
        assert (
            max(
                float(v.abs().max())
                for k, v in load_file(folders[2] / WEIGHTS).items()
                if "lora_B" in k
            )
            > 0
        )


def test_a_strong_penalty_keeps_apart_what_a_weak_one_lets_meet(tmp_path: Path) -> None:
    worst = {
        weight: largest_cosine(
            in_sequence(tmp_path / str(weight), 3, mode="penalty", weight=weight), "input"
        )
        for weight in (0.0, 1000.0)
    }
    assert worst[1000.0] < 0.1 < worst[0.0]


def test_resumed_it_makes_the_same_bytes(tmp_path: Path) -> None:
    folders = in_sequence(tmp_path / "before", 2, mode="project", sides="both")

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    def train(out: Path, earlier: list[Path], progress: Any = None) -> None:
        constraint = Orthogonality(EarlierAdapters.read(earlier), "project", "both")
        train_lora(tiny(), EXAMPLES, SETTINGS, out, constraint=constraint, progress=progress)

    train(tmp_path / "whole", folders)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", folders, interrupt)
    with pytest.raises(ConfigError, match=r"other constraint\.earlier"):
        train(tmp_path / "cut", folders[:1])
    train(tmp_path / "cut", folders)
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


# --- Where the room ends -------------------------------------------------------------------------


def test_what_has_no_room_shares_that_of_the_oldest(tmp_path: Path) -> None:
    """Width 8 holds four adapters of rank 2: a fifth takes the oldest's room."""
    bases = [torch.eye(8)[:, [2 * n % 8, (2 * n + 1) % 8]] for n in range(6)]
    assert [len(kept_apart(bases[:count], 2)) for count in range(7)] == [0, 1, 2, 3, 3, 3, 3]
    assert kept_apart(bases[:4], 2)[0] is bases[1]
    assert len(kept_apart(bases, 4)) == 2
    assert kept_apart(bases[:3], 7) == ()

    folders = [
        write(tmp_path / str(n), units(*range(8 * n, 8 * n + 8)), units(*range(8)).T)
        for n in range(4)
    ]
    earlier = EarlierAdapters.read(folders)
    assert earlier.left_out(8, "both") == {"input": {Q0: 1}, "output": {Q0: 1}}
    assert earlier.left_out(16, "input") == {"input": {Q0: 2}}
    assert EarlierAdapters.read(folders[:3]).left_out(8, "both") == {}

    network = adapted(rank=8)
    constraint = Orthogonality(earlier, "project")
    constraint.prepare(network)
    matrix = dict(network.named_parameters())[f"{Q0}.lora_A.default.weight"].detach()
    assert matrix[:, 8:].abs().max() < 1e-5
    assert matrix[:, :8].abs().max() > 0.01
