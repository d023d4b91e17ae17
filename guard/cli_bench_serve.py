"""`unlearn-guard bench serve`: the guard beside the bare upstream and its peers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli_eval import command_text, out_option
from guard.cli_session import Session, bundle_option

if TYPE_CHECKING:
    from benchmarks.report import Row
    from benchmarks.serve_arms import Arms, BundlePlace
    from benchmarks.serve_bench import Sizes
    from benchmarks.serve_stages import StageTimes
    from guard.types import Progress

_FILE = click.Path(path_type=Path)
STAGE_PROMPTS, QUICK_PROMPTS = 300, 20
"""Prompts whose stages are timed."""


@click.command("serve")
@bundle_option
@click.option("--many", type=_FILE, help="A bundle with many targets, measured beside the other.")
@click.option("--prompts", metavar="FILE[:FIELD]", help="Traffic [the benign set that ships].")
@click.option(
    "--asked", metavar="FILE[:FIELD]", help="Texts that keep the detectors busy [the traffic]."
)
@click.option("--model", help="Model files to enforce with [the packaged SmolLM2].")
@click.option("--litellm", metavar="PROGRAM", help="LiteLLM's proxy [litellm, if installed].")
@click.option("--vllm-router", metavar="PROGRAM", help="[vllm-router, if installed].")
@click.option("--no-peers", is_flag=True, help="Leave both out.")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="SETTING=VALUE",
    help="One more guard, with this setting changed. May be repeated.",
)
@click.option("--rounds", type=click.IntRange(1, 100), help="Times all is measured [5].")
@click.option("--quick", is_flag=True, help="See that it works; the figures mean nothing.")
@click.option("--seed", type=int, help="Seed of the order of texts, and of intervals.")
@out_option
@click.pass_context
def serve_bench(context: click.Context, /, **options: Any) -> None:
    """Measure the guard against the direct upstream, a bare relay, LiteLLM and vllm-router.

    All run at once before a fast mock upstream and are asked in turn, round by round; servers on
    one core, client and mock on another. Without a bundle, the example's is learned first and kept
    in --out. Writes report.json and table.md. On a busy machine only ratios mean something.
    """
    from benchmarks.report import Report, describe_versions, make_folder, write_report
    from guard.console import note, progress_display

    session: Session = context.obj
    given = {name: options[name] for name in ("bundle", "key_file", "model", "seed")}
    settings = session.load(**given).values
    out: Path = options["out"]
    make_folder(out)
    with progress_display() as progress:
        run = _Run(session, out, options, progress)
        rows = run.measure()
    report = Report(command_text(context), settings.seed, tuple(rows), describe_versions())
    write_report(out, report)
    _show(rows, run.many_name)
    note(f"{out}: report.json, table.md")


@dataclass(slots=True)
class _Run:
    """One run of the command."""

    session: Session
    out: Path
    options: dict[str, Any]
    progress: Progress
    many_name: str | None = None

    def measure(self) -> list[Row]:
        """Start all, measure, and return every figure."""
        from benchmarks.serve_process import Client, Cores, on

        cores = Cores.pick()
        with on(cores.server):
            # OpenBLAS counts the cores when it is loaded: two threads of it on one core would
            # wait for each other, and stages would be timed with them.
            import numpy as np

        from benchmarks.serve_arms import running
        from benchmarks.serve_bench import Bench
        from benchmarks.serve_rows import encoder_rows, memory_rows, serve_rows
        from benchmarks.serve_stages import stage_rows

        seed, work = self.session.settings.seed, self.out / "work"
        work.mkdir(exist_ok=True)
        place = self._bundle()
        texts, arms = self._texts(), self._arms(place)
        with on(cores.server):
            stages = self._time_stages(place, texts)
        with running(arms, work, cores, self.progress) as up, Client(texts, cores.client) as client:
            bench = Bench(up, client, self._sizes(), "asked")
            found = bench.run(self.progress)
            rows = serve_rows(found, up, seed) + memory_rows(up)
            self.many_name = next((arm.name for arm in up.of("many")), None)
        pass_ms = float(np.median(stages.encoder_pass)) / 1e3
        return rows + encoder_rows(found, pass_ms) + stage_rows(stages)

    def _sizes(self) -> Sizes:
        from dataclasses import replace

        from benchmarks.serve_bench import QUICK, Sizes

        sizes = QUICK if self.options["quick"] else Sizes()
        rounds: int | None = self.options["rounds"]
        return sizes if rounds is None else replace(sizes, rounds=rounds)

    def _arms(self, place: BundlePlace) -> Arms:
        from benchmarks.serve_arms import Arms, BundlePlace

        many: Path | None = self.options["many"]
        model = self.session.settings.model
        return Arms(
            bundle=place,
            many=None if many is None else BundlePlace.of(many),
            variants=[_variant(text) for text in self.options["variants"]],
            litellm=self._peer("litellm"),
            router=self._peer("vllm_router"),
            model=model,
        )

    def _peer(self, option: str) -> str | None:
        """Return a peer's program: the one that is named, or one that is installed."""
        from guard.console import note
        from guard.errors import ConfigError

        name, given = option.replace("_", "-"), self.options[option]
        if self.options["no_peers"]:
            return None
        found = shutil.which(given or name)
        if found is None and given:
            raise ConfigError(f"--{name} {given}: no such program")
        if found is None:
            note(f"{name} is not installed: it is left out (--{name} PROGRAM names one elsewhere)")
        return found

    def _bundle(self) -> BundlePlace:
        """Return the bundle that is set, or learn the example's."""
        from benchmarks.serve_arms import BundlePlace
        from guard.bundle import BundleStore

        settings = self.session.settings
        if self.options["bundle"] is not None or BundleStore(settings.bundle).exists():
            store, _ = self.session.existing_bundle()
            return BundlePlace(store.root, self.session.key_file)
        place = BundlePlace.of(self.out / "example")
        if not BundleStore(place.path).exists():
            self._learn_example(place)
        return place

    def _learn_example(self, place: BundlePlace) -> None:
        from guard.bundle import BundleStore
        from guard.errors import ConfigError
        from guard.keys import GuardKey
        from guard.targets import TargetRequest, add_target

        folder = _example()
        if folder is None:
            raise ConfigError("there is no bundle and no example to learn: give --bundle")
        key = GuardKey.load_or_create(place.key_file, create=True)
        files = folder / "forget.jsonl", folder / "retain.jsonl"
        add_target(
            TargetRequest("harry-potter", *files, seed=self.session.settings.seed),
            store=BundleStore(place.path, key),
            key=key,
            prompts=self.session.prompts(self.progress),
            engine=None,
            ledger=None,
            progress=self.progress,
        )

    def _texts(self) -> dict[str, list[str]]:
        """Return the traffic in an order of its own, and what keeps the detectors busy."""
        import random

        from classifiers.benign import load_benign

        spec, asked = self.options["prompts"], self.options["asked"]
        plain = load_benign() if spec is None else _read(spec)
        random.Random(self.session.settings.seed).shuffle(plain)
        return {"plain": plain, "asked": plain if asked is None else _read(asked)}

    def _time_stages(self, place: BundlePlace, texts: dict[str, list[str]]) -> StageTimes:
        from benchmarks.serve_stages import ROUNDS, time_stages
        from guard.build import load_guard
        from guard.bundle import BundleStore
        from guard.keys import GuardKey

        key = GuardKey.load_or_create(place.key_file)
        guard = load_guard(
            store=BundleStore(place.path, key),
            key=key,
            prompts=self.session.prompts(self.progress),
            ledger=None,
            threads=1,
        )
        quick = self.options["quick"]
        count, rounds = (QUICK_PROMPTS, 1) if quick else (STAGE_PROMPTS, ROUNDS)
        asked = texts["asked"][:QUICK_PROMPTS]
        return time_stages(guard, texts["plain"][:count], asked, rounds, self.progress)


def _read(spec: str) -> list[str]:
    """Read `FILE[:FIELD]` of JSON lines, or a text file of one prompt a line.

    Raises:
        DataError: If there is nothing in it.
    """
    from benchmarks.labelled import load_examples, parse_source
    from guard.errors import DataError

    if not spec.endswith(".txt"):
        return [example.text for example in load_examples(parse_source(spec)).examples]
    try:
        lines = Path(spec).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't be read: {error}", file=spec) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise DataError("there is no prompt in it", file=spec)
    return found


def _variant(text: str) -> tuple[str, str]:
    """Read `SETTING=VALUE`.

    Raises:
        ConfigError: If there is no such setting.
    """
    from guard.errors import ConfigError
    from guard.settings import Settings

    name, equals, value = text.partition("=")
    if not equals or name not in Settings.model_fields:
        raise ConfigError(
            f"--variant {text}: expected SETTING=VALUE; `unlearn-guard config` lists all settings"
        )
    return name, value


def _example() -> Path | None:
    """Return the folder of the example target, where this is a checkout."""
    folder = Path(__file__).parent.parent / "examples" / "harry-potter"
    return folder if (folder / "forget.jsonl").exists() else None


def _show(rows: list[Row], many_name: str | None) -> None:
    from benchmarks.serve_rows import goal_table
    from guard.console import print_table

    columns = ("figure", "found", "goal", "reached")
    print_table("bench serve", columns, goal_table(rows, many_name))
    print_table("stages, in this process", ("stage", "p50 us", "p99 us", "mean us"), _stages(rows))


def _stages(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    from benchmarks.report import format_number

    known = {(row.group, row.measure): row.value for row in rows if row.route == "in process"}
    stages = [group for group, measure in known if measure == "stage_p50_us"]
    figures = ("stage_p50_us", "stage_p99_us", "stage_mean_us")
    return [
        (stage, *(format_number(known[stage, figure]) for figure in figures))  # type: ignore[misc]
        for stage in stages
    ]
