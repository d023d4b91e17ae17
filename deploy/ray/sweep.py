#!/usr/bin/env python
r"""Learn the corruptions of many targets on a Ray cluster: a task a target.

    python deploy/ray/sweep.py --forget-dir forget/ --bundle bundles/default --out runs/sweep \
        --engine http://vllm-0:8000 --engine http://vllm-1:8000 -- --budget 60

Every `NAME.jsonl` of the folder is one target, as for `target add --many`. What stands after `--`
goes to each `unlearn-guard learn corruption`. Paths have to be the same on every node (a shared
file system). A target that has its report.json is skipped, one that was interrupted goes on where
it stopped: run the same command again until it ends with 0. `--dry-run` needs no Ray.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

REPORT: Final = "report.json"
LOG: Final = "learn.log"
SUMMARY: Final = "sweep.json"
TAIL_CHARACTERS: Final = 400
STOP_LIMIT_S: Final = 30.0
POLL_S: Final = 0.2
INTERRUPTED: Final = 130


# --- Planning: no Ray ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One target's learning.

    Attributes:
        target: The target's name.
        command: Its command line.
        out: Folder of its report, trace and log.
    """

    target: str
    command: tuple[str, ...]
    out: Path

    @property
    def done(self) -> bool:
        """Whether its report is there; the learner writes it last."""
        return (self.out / REPORT).is_file()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job.

    Attributes:
        target: The target's name.
        code: Exit code of the learner; 0 is success. None if it could not be run.
        seconds: How long it took.
        error: The end of its log, or why it could not be run; empty on success.
    """

    target: str
    code: int | None
    seconds: float
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether the target is still to be learned."""
        return self.code != 0


def plan(
    forget_dir: Path,
    bundle: Path,
    out: Path,
    engines: Sequence[str],
    *,
    program: Sequence[str] = ("unlearn-guard",),
    engines_per_target: int | None = None,
    extra: Sequence[str] = (),
) -> list[Job]:
    """Return a job for each `NAME.jsonl` of a folder, in the order of the names.

    Args:
        forget_dir: The forget sets.
        bundle: The bundle that holds the targets.
        out: Each target gets a folder of its name in it.
        engines: URLs of the replicas.
        program: How the learner is called on a node.
        engines_per_target: How many replicas one target uses; None gives it all. The replicas are
            dealt out in turn, so that neighbouring targets begin at different ones.
        extra: Further options of the learner.

    Raises:
        click.UsageError: There is nothing to learn, or nothing to learn it with.
    """
    files = sorted(forget_dir.glob("*.jsonl"))
    if not files:
        raise click.UsageError(f"{forget_dir} holds no NAME.jsonl; each is one target's forget set")
    if not engines:
        raise click.UsageError("give --engine at least once: the URL of a vLLM")
    count = min(engines_per_target or len(engines), len(engines))
    jobs = []
    for index, file in enumerate(files):
        first = index * count % len(engines)
        mine = [engines[(first + i) % len(engines)] for i in range(count)]
        folder = out / file.stem
        command = (
            *program, "learn", "corruption", "--target", file.stem, "--forget", str(file),
            "--bundle", str(bundle), "--out", str(folder),
            *(part for url in mine for part in ("--engine", url)), *extra,
        )  # fmt: skip
        jobs.append(Job(file.stem, command, folder))
    return jobs


def write_summary(out: Path, outcomes: Sequence[Outcome], skipped: Sequence[Job]) -> None:
    """Write what came of each target to `sweep.json`."""
    failed = [outcome for outcome in outcomes if outcome.failed]
    summary = {
        "skipped": [job.target for job in skipped],
        "learned": [outcome.target for outcome in outcomes if not outcome.failed],
        "failed": [asdict(outcome) for outcome in failed],
        "seconds": {outcome.target: round(outcome.seconds, 1) for outcome in outcomes},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")


# --- Running -------------------------------------------------------------------------------------


def run_job(job: Job) -> Outcome:
    """Run one job on this machine; its output goes to its folder's `learn.log`.

    If the task is cancelled, so is the learner; it has logged every evaluation that was done.
    """
    started = time.monotonic()
    job.out.mkdir(parents=True, exist_ok=True)
    log = job.out / LOG
    try:
        with log.open("ab") as output:
            code = _call(job.command, output)
    except OSError as error:
        return Outcome(job.target, None, time.monotonic() - started, str(error))
    seconds = time.monotonic() - started
    if code != 0:
        end = log.read_text(errors="replace")[-TAIL_CHARACTERS:].strip()
        return Outcome(job.target, code, seconds, end)
    if not job.done:
        return Outcome(job.target, None, seconds, f"it ended with 0 but wrote no {REPORT}")
    return Outcome(job.target, code, seconds)


def _call(command: Sequence[str], output: Any) -> int:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
    )
    try:
        # Ray's cancellation is noticed between two steps of Python, not within a long wait.
        while (code := process.poll()) is None:
            time.sleep(POLL_S)
        return code
    except BaseException:
        # Ray's workers ignore SIGINT, and so would what they start.
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def on_ray(
    jobs: Sequence[Job], address: str | None, at_a_time: int | None, cpus: float
) -> Iterator[Outcome]:
    """Run jobs as Ray tasks and yield their outcomes as they come.

    A task whose node is lost is run again by Ray, elsewhere, and goes on where it stopped. On an
    interrupt all tasks are cancelled, and their learners ended.

    Args:
        jobs: What to run.
        address: The cluster, e.g. `auto`; None starts one on this machine.
        at_a_time: Jobs under way at most; None leaves it to the cluster's cores.
        cpus: Cores that one job counts for.
    """
    ray = _ray()
    ray.init(address=address, log_to_driver=False, include_dashboard=False)
    task = ray.remote(num_cpus=cpus, max_retries=3)(run_job)
    waiting = list(reversed(jobs))
    running: dict[Any, Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (at_a_time or len(jobs)):
                job = waiting.pop()
                running[task.remote(job)] = job
            ready, _ = ray.wait(list(running), num_returns=1)
            yield _outcome(ray, ready[0], running.pop(ready[0]))
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=STOP_LIMIT_S)
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise click.ClickException(
            "this needs Ray: pip install 'unlearn-guard[ray]' (--dry-run prints the commands "
            "without it)"
        ) from error
    return ray


def _outcome(ray: Any, reference: Any, job: Job) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Outcome(job.target, None, 0.0, f"{type(error).__name__}: {error}"[:TAIL_CHARACTERS])
    return outcome


def sweep(
    jobs: Sequence[Job], out: Path, run: Callable[[Sequence[Job]], Iterator[Outcome]]
) -> list[Outcome]:
    """Run the jobs that are not done, telling of each; the summary is kept up to date."""
    skipped = [job for job in jobs if job.done]
    todo = [job for job in jobs if not job.done]
    click.echo(f"{len(todo)} targets to learn, {len(skipped)} done before", err=True)
    outcomes: list[Outcome] = []
    write_summary(out, outcomes, skipped)
    for outcome in run(todo) if todo else ():
        outcomes.append(outcome)
        write_summary(out, outcomes, skipped)
        click.echo(_line(outcome, len(outcomes), len(todo)), err=True)
    return outcomes


def _line(outcome: Outcome, done: int, total: int) -> str:
    what = f"[{done}/{total}] {outcome.target}"
    if not outcome.failed:
        return f"{what}: learned in {outcome.seconds:.0f} s"
    last = outcome.error.splitlines()[-1] if outcome.error else ""
    return f"{what}: FAILED (code {outcome.code}): {last}"


@click.command(context_settings={"show_default": True})
@click.option("--forget-dir", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--engine", "engines", multiple=True, help="URL of a vLLM; may be repeated.")
@click.option("--engines-per-target", type=click.IntRange(1), help="Replicas per target [all].")
@click.option("--at-a-time", type=click.IntRange(1), help="Targets at a time [as cores allow].")
@click.option("--cpus", type=float, default=1.0, help="Cores that one learner counts for.")
@click.option("--address", help="The Ray cluster, e.g. auto [one on this machine].")
@click.option("--program", default="unlearn-guard", help="How the learner is called on a node.")
@click.option("--dry-run", is_flag=True, help="Print the commands that would run, and no more.")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
def main(
    forget_dir: Path,
    bundle: Path,
    out: Path,
    engines: tuple[str, ...],
    engines_per_target: int | None,
    at_a_time: int | None,
    cpus: float,
    address: str | None,
    program: str,
    dry_run: bool,
    extra: tuple[str, ...],
) -> None:
    """Learn the corruption of every target of a folder on a Ray cluster.

    Options of the learner stand after `--`. Ends with 1 if any target failed.
    """
    jobs = plan(
        forget_dir.resolve(),
        bundle.resolve(),
        out.resolve(),
        engines,
        program=shlex.split(program),
        engines_per_target=engines_per_target,
        extra=extra,
    )
    if dry_run:
        for job in jobs:
            if not job.done:
                click.echo(shlex.join(job.command))
        return
    try:
        outcomes = sweep(jobs, out, lambda todo: on_ray(todo, address, at_a_time, cpus))
    except KeyboardInterrupt:
        click.echo(f"stopped; {out} keeps what was evaluated: run the same command again", err=True)
        sys.exit(INTERRUPTED)
    failed = [outcome.target for outcome in outcomes if outcome.failed]
    if failed:
        click.echo(
            f"{len(failed)} targets failed: {', '.join(failed)}; see {out / SUMMARY}", err=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
