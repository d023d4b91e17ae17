"""The Ray sweep without Ray: what it plans, runs, skips and reports.

Under Ray itself it is tried by hand; docs/scaling-learning.md says how and what came of it.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner, Result

from guard.cli_learn import learn_group

SCRIPT = Path(__file__).parents[2] / "deploy" / "ray" / "sweep.py"
URLS = ["http://a:1", "http://b:1", "http://c:1"]
LEARNER = """
import pathlib, sys
words = sys.argv
out = pathlib.Path(words[words.index("--out") + 1])
if "bad" in words:
    sys.exit("no such target")
if "silent" not in words:
    (out / "report.json").write_text("{}")
"""


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sweep", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "forget").mkdir()
    for name in ("ada", "bea", "cleo", "dora"):
        (tmp_path / "forget" / f"{name}.jsonl").touch()
    (tmp_path / "forget" / "README.md").touch()
    (tmp_path / "learner.py").write_text(LEARNER)
    return tmp_path


def run(sweep: ModuleType, folder: Path, *options: str) -> Result:
    """Run the command; a failed assertion is easier to read with what it said."""
    return CliRunner().invoke(
        sweep.main,
        [
            *("--forget-dir", str(folder / "forget"), "--bundle", str(folder / "bundle")),
            *("--out", str(folder / "out"), "--engine", URLS[0], "--engine", URLS[1]),
            *("--program", shlex.join([sys.executable, str(folder / "learner.py")])),
            *options,
        ],
    )


def here(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run jobs one after the other in this process, where Ray would deal them out."""
    monkeypatch.setattr(sweep, "on_ray", lambda jobs, *_: map(sweep.run_job, jobs))


def test_every_file_is_a_target_with_a_command_the_learner_takes(
    sweep: ModuleType, folder: Path
) -> None:
    jobs = sweep.plan(
        folder / "forget", folder / "bundle", folder / "out", URLS, extra=["--budget", "7"]
    )
    assert [job.target for job in jobs] == ["ada", "bea", "cleo", "dora"]
    command = list(jobs[1].command)
    assert command[:3] == ["unlearn-guard", "learn", "corruption"]
    corruption = learn_group.commands["corruption"]
    taken = corruption.make_context("corruption", command[3:]).params
    assert taken["engines"] == tuple(URLS)
    assert (taken["target"], taken["budget"]) == ("bea", 7)
    assert taken["forget"] == folder / "forget" / "bea.jsonl"
    assert taken["out"] == folder / "out" / "bea"


def test_replicas_are_dealt_out_in_turn(sweep: ModuleType, folder: Path) -> None:
    jobs = sweep.plan(folder / "forget", folder, folder, URLS, engines_per_target=2)
    engines = [
        [url for flag, url in zip(job.command, job.command[1:], strict=False) if flag == "--engine"]
        for job in jobs
    ]
    assert [[url[7] for url in each] for each in engines] == [
        ["a", "b"],
        ["c", "a"],
        ["b", "c"],
        ["a", "b"],
    ]
    more = sweep.plan(folder / "forget", folder, folder, URLS, engines_per_target=9)
    assert all(job.command.count("--engine") == 3 for job in more)


@pytest.mark.parametrize(("files", "urls"), [(False, URLS), (True, [])])
def test_nothing_to_do_is_an_error(
    files: bool, urls: list[str], sweep: ModuleType, folder: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(click.UsageError, match=r"NAME\.jsonl|--engine"):
        sweep.plan(folder / "forget" if files else empty, folder, folder, urls)


def test_a_dry_run_prints_what_is_left_to_run(sweep: ModuleType, folder: Path) -> None:
    (folder / "out" / "bea").mkdir(parents=True)
    (folder / "out" / "bea" / "report.json").touch()
    result = run(sweep, folder, "--dry-run", "--", "--objective", "rouge-l")
    assert result.exit_code == 0, result.output
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert [line[line.index("--target") + 1] for line in lines] == ["ada", "cleo", "dora"]
    assert all(line[-2:] == ["--objective", "rouge-l"] for line in lines)
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["bea"]


def test_failures_are_told_and_only_they_are_tried_again(
    sweep: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(sweep, monkeypatch)
    for name in ("bad", "silent"):
        (folder / "forget" / f"{name}.jsonl").touch()
    first = run(sweep, folder)
    assert first.exit_code == 1, first.output
    assert "2 targets failed: bad, silent" in first.stderr
    summary = json.loads((folder / "out" / "sweep.json").read_text())
    assert summary["learned"] == ["ada", "bea", "cleo", "dora"]
    errors = {entry["target"]: (entry["code"], entry["error"]) for entry in summary["failed"]}
    assert errors["bad"] == (1, "no such target")
    assert "report.json" in errors["silent"][1]

    for name in ("bad", "silent"):
        (folder / "forget" / f"{name}.jsonl").unlink()
    (folder / "forget" / "eve.jsonl").touch()
    second = run(sweep, folder)
    assert second.exit_code == 0, second.output
    summary = json.loads((folder / "out" / "sweep.json").read_text())
    assert (summary["learned"], len(summary["skipped"])) == (["eve"], 4)


def test_a_learner_that_cannot_be_started_fails_its_target(
    sweep: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(sweep, monkeypatch)
    result = run(sweep, folder, "--program", str(folder / "no-such-program"))
    assert result.exit_code == 1
    assert "4 targets failed" in result.stderr
    assert "no-such-program" in result.stderr


def test_without_ray_it_says_what_to_install(
    sweep: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(sweep, folder)
    assert result.exit_code == 1
    assert "unlearn-guard[ray]" in result.stderr
