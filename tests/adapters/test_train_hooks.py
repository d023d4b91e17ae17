"""Constraints, validation with early stopping, and limited layers, on a small random model."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from adapters.adapter_files import WEIGHTS
from adapters.checkpoint import read_checkpoint
from adapters.examples import Example, collate
from adapters.losses import cross_entropy
from adapters.merge import merge_adapter
from adapters.train import REPORT, TrainSettings, read_training, train_lora
from guard.errors import ConfigError

EXAMPLES = [Example((1, 10 + n, 5), (20 + 3 * n, 30 + n, 40, 2)) for n in range(5)]
HELD_OUT = [Example((1, 50 + n, 5), (60 + n, 70, 2)) for n in range(3)]
SETTINGS = TrainSettings(
    rank=3, alpha=6, epochs=4, batch=2, rate=1e-2, dropout=0.1, seed=3, checkpoint_every=5
)
STEPS = 12
VALIDATED = TrainSettings(
    rank=3, alpha=6, epochs=4, batch=2, rate=1e-2, dropout=0.1, seed=3, validate_every=2
)


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config)


def held_out(network: Any) -> float:
    return float(cross_entropy(network, collate(HELD_OUT, range(3))))


class Halved:
    """Starts A at what it is told, pulls it to 0, and halves B after each step."""

    def __init__(self, start: float = 0.1, weight: float = 0.5) -> None:
        self.identity: Mapping[str, Any] = {"start": start, "weight": (weight, "A")}
        self.start, self.weight = start, weight
        self.seen: list[float] = []

    def prepare(self, network: Any) -> None:
        for name, value in network.named_parameters():
            if "lora_A" in name:
                value.copy_(torch.full_like(value, self.start))

    def penalty(self, network: Any) -> Tensor | None:
        values = [one for name, one in network.named_parameters() if "lora_A" in name]
        self.seen.append(float(values[0].detach().abs().mean()))
        return self.weight * torch.stack([one.square().sum() for one in values]).sum()

    def after_step(self, network: Any) -> None:
        for name, value in network.named_parameters():
            if "lora_B" in name:
                value.mul_(0.5)


def interrupted_at(step: int) -> Any:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    return interrupt


# --- Constraints ---------------------------------------------------------------------------------


def test_a_constraint_sets_the_start_adds_to_the_loss_and_corrects_each_step(
    tmp_path: Path,
) -> None:
    pulled, free = Halved(weight=50.0), Halved(weight=0.0)
    reports = [
        train_lora(tiny(), EXAMPLES, SETTINGS, tmp_path / name, constraint=one)
        for name, one in (("pulled", pulled), ("free", free))
    ]
    assert pulled.seen[0] == free.seen[0] == pytest.approx(0.1)
    assert pulled.seen[-1] < 0.7 * free.seen[-1]
    assert len(pulled.seen) == STEPS
    # B is 0 at the first step; A's start changes nothing, and the penalty isn't in the report.
    assert reports[0].losses[0] == reports[1].losses[0]
    halved = load_file(tmp_path / "free" / WEIGHTS)
    train_lora(tiny(), EXAMPLES, SETTINGS, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / WEIGHTS)
    ratio = [float(halved[n].norm() / plain[n].norm()) for n in plain if "lora_B" in n]
    assert max(ratio) < 0.6


def test_a_constraint_is_part_of_what_a_training_is(tmp_path: Path) -> None:
    report = train_lora(tiny(), EXAMPLES, SETTINGS, tmp_path, constraint=Halved())
    assert train_lora(tiny(), EXAMPLES, SETTINGS, tmp_path, constraint=Halved()) == report
    for other in (None, Halved(weight=0.6)):
        with pytest.raises(ConfigError, match=r"other constraint"):
            train_lora(tiny(), EXAMPLES, SETTINGS, tmp_path, constraint=other)


# --- Validation ----------------------------------------------------------------------------------


def test_the_best_adapter_is_the_one_that_is_written(tmp_path: Path) -> None:
    """Training on other examples soon harms the held-out ones."""
    settings = TrainSettings(rank=3, alpha=6, epochs=8, batch=2, rate=3e-2, validate_every=7)
    report = train_lora(tiny(), EXAMPLES, settings, tmp_path, validation=held_out)
    assert [step for step, _ in report.validations] == [7, 14, 21, 24] and report.steps == 24
    best = dict(report.validations)[report.best_step or 0]
    assert best == min(value for _, value in report.validations)
    assert report.validations[-1][1] > best + 0.1  # or the last would do as well
    assert read_training(tmp_path) == report
    written = merge_adapter(tiny(), tmp_path).eval()
    with torch.no_grad():
        assert held_out(written) == pytest.approx(best, abs=5e-3)


def test_training_ends_when_it_no_longer_gets_better(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 1.0, 0.0])
    totals: list[tuple[int, int]] = []
    report = train_lora(
        tiny(),
        EXAMPLES,
        TrainSettings(rank=2, epochs=8, batch=2, validate_every=3, patience=2),
        tmp_path,
        validation=lambda network: next(values),
        progress=lambda what, done, total: totals.append((done, total)),
    )
    assert report.validations == ((3, 3.0), (6, 1.0), (9, 2.0), (12, 1.0))
    assert (report.best_step, report.steps) == (6, 12)
    assert totals[-2:] == [(11, 24), (12, 12)]


def test_validating_changes_nothing_of_the_training(tmp_path: Path) -> None:
    """Also where the validation draws random numbers and the last step is the best."""
    modes: list[tuple[bool, bool]] = []
    falling = iter(range(100, 0, -1))

    def restless(network: Any) -> float:
        modes.append((network.training, torch.is_grad_enabled()))
        torch.rand(7)
        held_out(network)
        return float(next(falling))

    plain = train_lora(tiny(), EXAMPLES, SETTINGS, tmp_path / "plain")
    looked = train_lora(tiny(), EXAMPLES, VALIDATED, tmp_path / "looked", validation=restless)
    assert modes == [(False, False)] * 6
    assert (looked.losses, looked.best_step) == (plain.losses, STEPS)
    assert plain.validations == () and plain.best_step is None
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("plain", "looked")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("stop_at", [3, 9, 14])
def test_resumed_with_constraint_and_validation_it_makes_the_same_bytes(
    tmp_path: Path, stop_at: int
) -> None:
    """Also where the best came before the interruption, and where patience ran out at it."""
    settings = TrainSettings(
        rank=3, alpha=6, epochs=6, batch=2, rate=3e-2, seed=1, validate_every=2, patience=3
    )

    def train(out: Path, progress: Any = None) -> Any:
        return train_lora(
            tiny(),
            EXAMPLES,
            settings,
            out,
            constraint=Halved(),
            validation=held_out,
            progress=progress,
        )

    whole = train(tmp_path / "whole")
    assert whole.best_step == 8 and whole.steps == 14  # else the cases above aren't covered
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", interrupted_at(stop_at))
    state = read_checkpoint(tmp_path / "cut")
    assert state is not None and len(state.validations) == stop_at // 2
    resumed = train(tmp_path / "cut")
    assert (resumed.losses, resumed.validations) == (whole.losses, whole.validations)
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


def test_a_checkpoint_with_other_validation_or_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_lora(
            tiny(),
            EXAMPLES,
            VALIDATED,
            tmp_path,
            validation=held_out,
            progress=interrupted_at(3),
        )
    with pytest.raises(ConfigError, match=r"other settings\.validate_every"):
        train_lora(tiny(), EXAMPLES, SETTINGS, tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    limited = TrainSettings(rank=3, epochs=1, layers=(0, 1))
    train_lora(tiny(), EXAMPLES, limited, tmp_path)
    with pytest.raises(ConfigError, match=r"other settings\.layers"):
        train_lora(tiny(), EXAMPLES, TrainSettings(rank=3, epochs=1), tmp_path)


def test_a_validation_that_is_no_number_or_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to validate with"):
        train_lora(tiny(), EXAMPLES, VALIDATED, tmp_path)
    with pytest.raises(ConfigError, match="validation is nan after step 2"):
        train_lora(tiny(), EXAMPLES, VALIDATED, tmp_path, validation=lambda _: float("nan"))
    for wrong in ({"patience": 1}, {"validate_every": -1}, {"layers": (2, 2)}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TrainSettings(**wrong)  # type: ignore[arg-type]


# --- Layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", ["all-linear", ("q_proj", "down_proj")])
def test_only_the_layers_asked_for_are_adapted(
    tmp_path: Path, modules: str | tuple[str, ...]
) -> None:
    settings = TrainSettings(rank=2, epochs=2, layers=(1, 3), modules=modules)
    train_lora(tiny(), EXAMPLES, settings, tmp_path)
    names = {name.removeprefix("base_model.model.model.") for name in load_file(tmp_path / WEIGHTS)}
    assert {name.split(".")[1] for name in names} == {"1", "2"}
    per_layer = 7 if modules == "all-linear" else 2
    assert len(names) == 2 * 2 * per_layer
    assert merge_adapter(tiny(), tmp_path) is not None


def test_layers_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    for modules in ("all-linear", ("q_proj",)):
        settings = TrainSettings(rank=2, layers=(1, 4), modules=modules)
        with pytest.raises(ConfigError, match="the model has 3"):
            train_lora(tiny(), EXAMPLES, settings, tmp_path)
    assert not (tmp_path / REPORT).exists()
