"""How far adapters of targets that came one after another are kept apart, by each way.

Every arm trains one adapter a target, in sequence, each kept apart from those before it, and then
looks at the finished files: the largest cosine of a principal angle of any two adapters in any
layer, of what they read (A's rows) and of what they write (B's columns), and what keeping apart
costs in loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.report import Row

if TYPE_CHECKING:
    from adapters.examples import Example
    from adapters.losses import Loss
    from adapters.orthogonal import EarlierAdapters, Mode, Orthogonality, Sides
    from adapters.train import TrainReport, TrainSettings
    from guard.types import Progress

ROUTE: Final = "adapt"


@dataclass(frozen=True, slots=True)
class Arm:
    """A way of keeping apart; see `adapters.orthogonal.Orthogonality`."""

    mode: Mode
    sides: Sides = "input"
    weight: float = 0.1
    starts_apart: bool = True

    @property
    def name(self) -> str:
        """Names the arm in reports and folders."""
        if self.mode == "none":
            return "none"
        weight = f"-{self.weight:g}" if self.mode == "penalty" else ""
        return f"{self.mode}-{self.sides}{weight}{'' if self.starts_apart else '-random'}"

    def constraint(self, earlier: EarlierAdapters) -> Orthogonality:
        """Return what keeps a new adapter apart from the earlier ones."""
        from adapters.orthogonal import Orthogonality

        return Orthogonality(earlier, self.mode, self.sides, self.weight, self.starts_apart)


ARMS: Final = (
    Arm("none"),
    Arm("penalty", starts_apart=False),
    Arm("penalty"),
    Arm("penalty", weight=100.0),
    Arm("project"),
    Arm("project", "both"),
)


def compare_arms(
    model: Any,
    targets: Sequence[Sequence[Example]],
    settings: TrainSettings,
    folder: Path,
    *,
    arms: Sequence[Arm] = ARMS,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Train every target's adapter by every arm, and compare what came of it.

    Args:
        model: A transformers causal language model in float32; left as it was.
        targets: Each target's examples, in the order in which they came.
        settings: Of each training. The figures depend on the rate and the number of steps: each
            step takes the matrices further from where they started.
        folder: Keeps the adapters; a comparison that was interrupted goes on there.
        arms: What to compare.
        loss: Of training; cross-entropy of the examples' answers if not given.
        progress: Called as `progress(what, steps done, steps)`.

    Returns:
        By arm, as group: `cosine_input` and `cosine_output`, largest of any two adapters in any
        layer; `loss_last`, mean over the targets of that of the last steps; `train_s`, of all.

    Raises:
        DataError: A target has no examples.
    """
    from adapters.losses import cross_entropy
    from adapters.orthogonal import EarlierAdapters
    from adapters.train import train_lora

    rows: list[Row] = []
    for arm in arms:
        folders: list[Path] = []
        reports = []
        for number, examples in enumerate(targets):
            out = folder / arm.name / f"{number:03d}"
            report = train_lora(
                model,
                examples,
                # Its own seed: with one for all, A would start the same for all.
                replace(settings, seed=settings.seed + number),
                out,
                loss=loss or cross_entropy,
                constraint=arm.constraint(EarlierAdapters.read(folders)),
                progress=progress,
                what=f"{arm.name}: target {number + 1} of {len(targets)}",
            )
            folders.append(out)
            reports.append(report)
        rows += _rows(arm, folders, reports)
    return rows


def _rows(arm: Arm, folders: Sequence[Path], reports: Sequence[TrainReport]) -> list[Row]:
    from adapters.orthogonal import largest_cosine

    values = {
        "cosine_input": largest_cosine(folders, "input"),
        "cosine_output": largest_cosine(folders, "output"),
        "loss_last": float(np.mean([report.last_loss() for report in reports])),
        "train_s": sum(report.seconds for report in reports),
    }
    return [
        Row("guard", ROUTE, measure, f"arm={arm.name}", value, None, None, len(reports))
        for measure, value in values.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure it on TOFU authors that are to be refused, and write the report."""
    from adapters.examples import encode_chats
    from adapters.train_settings import TrainSettings
    from benchmarks.report import write_module_report
    from guard.console import progress_display
    from server.engines.embedded.model import EmbeddedModel

    args = _parser().parse_args(arguments)
    model = EmbeddedModel.load(args.model, threads=args.threads)
    targets = [encode_chats(model.tokenizer, pairs) for pairs in _refused(args)]
    count = model.model.config.num_hidden_layers
    settings = TrainSettings(
        rank=args.rank,
        alpha=2 * args.rank,
        layers=(count - args.layers, count),
        epochs=args.epochs,
        batch=2,
        rate=args.rate,
        seed=args.seed,
    )
    with progress_display() as progress:
        rows = compare_arms(
            model.model, targets, settings, args.out / "adapters", progress=progress
        )
    write_module_report(args.out, "benchmarks.orthogonality", arguments, rows, seed=args.seed)


def _refused(args: argparse.Namespace) -> list[list[tuple[str, str]]]:
    """Questions about each of the last authors, each with a refusal for its answer."""
    from adapters.alternatives import REFUSALS

    asked: dict[int, list[str]] = {}
    for line in (args.data / "full.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked.setdefault(int(row["author_id"]), []).append(str(row["question"]))
    chosen = sorted(asked)[-args.targets :]
    refusals = cycle(REFUSALS)
    return [
        [(question, next(refusals)) for question in asked[author][: args.questions]]
        for author in chosen
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="directory of a model")
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's files")
    parser.add_argument("--targets", type=int, default=20)
    parser.add_argument("--questions", type=int, default=8, help="of each target")
    parser.add_argument("--layers", type=int, default=2, help="the last of the model's")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
