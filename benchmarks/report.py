"""The report that every `eval`, `bench` and `learn` command leaves in its `--out` folder.

    report.json   {schema, command, seed, versions, machine, rows}, for programs
    table.md      the same rows, for people

A row is one figure: {system, route, measure, group, value, ci_low, ci_high, n}. Nothing in it names
the machine or who uses it, so that a report can be published as it is.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from guard.disk import replace_file
from guard.errors import ConfigError, DataError

SCHEMA = "unlearn-guard/report/1"
REPORT_FILE, TABLE_FILE = "report.json", "table.md"

PACKAGES = (
    "unlearn-guard",
    "numpy",
    "onnxruntime",
    "tokenizers",
    "faiss-cpu",
    "scikit-learn",
    "torch",
    "transformers",
    "peft",
    "vllm",
)

_TEXTS = ("system", "route", "measure", "group")
_NUMBERS = ("value", "ci_low", "ci_high")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        system: What was measured, e.g. `guard`, `eco`.
        route: How it was asked, e.g. `decide`, `score`, `embedded`, `vllm`.
        measure: What the figure is, with its unit where it has one: `recall`, `latency_p50_ms`.
        group: Of which part of the data, e.g. `all`, `category=mmlu`.
        value: The figure; None where the data can't tell.
        ci_low: Lower end of its 95 % interval, if one was computed.
        ci_high: Upper end of it.
        n: How many observations it rests on.
    """

    system: str
    route: str
    measure: str
    group: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of one run, and what they were measured with.

    Attributes:
        command: The command line, without the folders of this machine: see `command_line`.
        seed: Of everything random; None if nothing was.
        rows: The figures.
        versions: Of the packages, and of whatever else was used (`bundle`, a model).
        machine: See `describe_machine`.
    """

    command: str
    seed: int | None
    rows: tuple[Row, ...]
    versions: Mapping[str, str] = field(default_factory=lambda: describe_versions())
    machine: Mapping[str, Any] = field(default_factory=lambda: describe_machine())


def write_report(out: Path, report: Report) -> None:
    """Write `report.json` and `table.md` into the folder `out`, which is made if need be."""
    make_folder(out)
    rows = [
        asdict(row) | {name: _finite(getattr(row, name)) for name in _NUMBERS}
        for row in report.rows
    ]
    value = {
        "schema": SCHEMA,
        "command": report.command,
        "seed": report.seed,
        "versions": dict(report.versions),
        "machine": dict(report.machine),
        "rows": rows,
    }
    data = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(out / REPORT_FILE, data.encode())
    replace_file(out / TABLE_FILE, table(report).encode())


def write_module_report(
    out: Path,
    module: str,
    arguments: Sequence[str] | None,
    rows: Sequence[Row],
    *,
    seed: int | None = None,
    **versions: str,
) -> None:
    """Write the report of a benchmark that is run by `python -m`.

    Args:
        out: Its folder.
        module: The benchmark's module.
        arguments: What it was called with; None stands for the process's own.
        rows: What it found.
        seed: Of everything random.
        versions: Of what it used beside this project's own dependencies.
    """
    words = ["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]
    found = describe_versions(**versions)
    write_report(out, Report(command_line(words), seed, tuple(rows), found, describe_machine()))


def read_report(path: Path) -> Report:
    """Read a report again.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        DataError: If it isn't there or isn't a report of this schema.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror or error}", file=str(file)) from error
    except ValueError as error:
        raise DataError(f"not JSON: {error}", file=str(file)) from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise DataError(f"not a report of schema {SCHEMA}", file=str(file), field="schema")
    try:
        return Report(
            command=value["command"],
            seed=value["seed"],
            rows=tuple(_row(row) for row in value["rows"]),
            versions=value["versions"],
            machine=value["machine"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not a whole report: {error}", file=str(file)) from error


def make_folder(out: Path) -> None:
    """Make the folder that a command writes to.

    Raises:
        ConfigError: If it can't be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} can't be made: {error.strerror or error}") from error


def describe_versions(**more: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed, and `more`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | more


def describe_machine(accelerator: str | None = None) -> dict[str, Any]:
    """Describe the machine: what matters to figures, nothing that tells whose it is.

    Args:
        accelerator: The GPU's name, where one was used.
    """
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": accelerator,
    }


def command_line(words: Iterable[str]) -> str:
    """Return a command as a shell would take it; of absolute paths only the name is kept."""
    return shlex.join(_impersonal(word) for word in words)


def table(report: Report) -> str:
    """Return the report as Markdown: a table for each measure, in the order of the rows."""
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items() if value)
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    seed = "nothing was random" if report.seed is None else f"seed {report.seed}"
    parts = [f"`{report.command}`\n\n{seed}; {machine}; {versions}\n"]
    for measure in dict.fromkeys(row.measure for row in report.rows):
        rows = [row for row in report.rows if row.measure == measure]
        parts.append(_section(measure, rows))
    return "\n".join(parts)


def format_number(value: float | None) -> str:
    """Return a figure with four digits, `-` where there is none."""
    return "-" if value is None else f"{value:.4g}"


def format_interval(row: Row) -> str:
    """Return a row's interval, `-` where there is none."""
    if row.ci_low is None and row.ci_high is None:
        return "-"
    return f"{format_number(row.ci_low)} to {format_number(row.ci_high)}"


def _section(measure: str, rows: Sequence[Row]) -> str:
    lines = [
        f"## {measure}\n",
        "| system | route | group | value | 95 % | n |",
        "| --- | --- | --- | --: | --- | --: |",
    ]
    for row in rows:
        texts = [row.system, row.route, row.group, format_number(row.value), format_interval(row)]
        cells = [text.replace("|", "\\|").replace("\n", " ") for text in texts]
        lines.append(f"| {' | '.join(cells)} | {row.n} |")
    return "\n".join(lines) + "\n"


def _row(value: Any) -> Row:
    if not isinstance(value, dict) or set(value) != {one.name for one in fields(Row)}:
        raise ValueError(f"a row is {str(value)[:80]}")
    row = Row(**value)
    good = all(isinstance(getattr(row, name), str) for name in _TEXTS)
    numbers = [getattr(row, name) for name in _NUMBERS]
    good = good and all(one is None or isinstance(one, int | float) for one in numbers)
    if not good or not isinstance(row.n, int):
        raise ValueError(f"a row is {str(value)[:80]}")
    return row


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return None if value is None or not math.isfinite(value) else float(value)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return "unknown"


def _impersonal(word: str) -> str:
    """Keep of a path that begins at the root, or at somebody's home, the last part."""
    option, equals, path = word.partition("=") if word.startswith("-") else ("", "", word)
    if not path.startswith(("/", "~")):
        return word
    absolute, here = Path(path).expanduser(), Path.cwd()
    kept = absolute.relative_to(here) if absolute.is_relative_to(here) else Path(absolute.name)
    return f"{option}{equals}{kept}"
