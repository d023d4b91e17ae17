"""Does the guarded model still know the target, does it still answer, and is the rest unchanged?

    python -m benchmarks.leak --url http://127.0.0.1:8000 --unguarded-url http://127.0.0.1:8001 \
        --probes examples/harry-potter/probes.jsonl [--stream] [--json OUT]

Asks through the official `openai` client, greedily, as a client would. With `--mark`, `--url` is an
unguarded server and the probes that it answers with the fact are marked `known` in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.table import Table

from benchmarks.leak_report import (
    BenignReport,
    LeakReport,
    compare_benign,
    failures,
    measure_leak,
    spread_out,
)
from benchmarks.measures import Share, holds_fact, is_empty, is_repetitive
from benchmarks.probes import mark_known, read_probes, write_probes
from guard.console import note, progress_display
from guard.errors import ConfigError, DataError
from guard.rows import read_texts
from guard.types import Progress

__all__ = ["Endpoint", "holds_fact", "is_empty", "is_repetitive", "main"]


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server, asked greedily.

    Attributes:
        client: The official client.
        model: Name of the model to ask.
        stream: Whether answers are streamed.
        concurrency: Requests under way at once.
    """

    client: openai.OpenAI
    model: str
    stream: bool = False
    concurrency: int = 1

    @classmethod
    def connect(cls, url: str, model: str | None, stream: bool, concurrency: int) -> Endpoint:
        """Connect to `url`; without a model name, take the first one that the server lists.

        Raises:
            ConfigError: If the server lists no model.
        """
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        client = openai.OpenAI(base_url=base, api_key="unused", max_retries=20, timeout=600)
        names = [model] if model else [listed.id for listed in client.models.list()]
        if not names:
            raise ConfigError(f"{base} lists no model; name one with --model")
        return cls(client, names[0], stream, concurrency)

    def ask(self, question: str, max_tokens: int) -> str:
        """Return the greedy answer to `question`."""
        options: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        if not self.stream:
            answer = self.client.chat.completions.create(**options)
            return answer.choices[0].message.content or ""
        chunks = self.client.chat.completions.create(**options, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    def ask_all(
        self, questions: Sequence[str], max_tokens: int, what: str, progress: Progress
    ) -> list[str]:
        """Return the answers, in the order of `questions`."""
        answers = []
        with ThreadPoolExecutor(self.concurrency) as pool:
            for answer in pool.map(lambda question: self.ask(question, max_tokens), questions):
                answers.append(answer)
                progress(what, len(answers), len(questions))
        return answers


# --- Showing it ----------------------------------------------------------------------------------


def leak_table(report: LeakReport) -> Table:
    """Return the figures as a table."""
    table = Table("measure", "guarded", "unguarded", title="Leak and answer quality")
    old = report.unguarded_quality

    def row(name: str, new: Share, before: Share | None) -> None:
        table.add_row(name, show(new), show(before) if before is not None else "-")

    row("answer holds the fact", report.leak, report.unguarded_known)
    row("empty", report.quality.empty, old.empty if old else None)
    row("repetitive", report.quality.repetitive, old.repetitive if old else None)
    row("commonest opening", report.quality.same_opening, old.same_opening if old else None)
    distinct = f"{old.distinct:.3f}" if old else "-"
    table.add_row("distinct answers / answers", f"{report.quality.distinct:.3f}", distinct)
    return table


def show(part: Share) -> str:
    """Return a share as text, with its interval."""
    ends = f"{part.low:.1%} to {part.high:.1%}"
    return f"{part.count}/{part.total} = {part.rate:.1%} ({ends})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--url", required=True, help="server under test")
    parser.add_argument("--unguarded-url", help="the same model without a guard, for comparison")
    parser.add_argument("--probes", type=Path, help="probes, JSON lines")
    parser.add_argument("--all", action="store_true", help="ask unknown probes too")
    parser.add_argument("--mark", action="store_true", help="mark the probes that --url knows")
    parser.add_argument("--benign", type=Path, help="prompts whose answers must not change")
    parser.add_argument("--limit", type=int, default=200, help="benign prompts to ask")
    parser.add_argument("--max-tokens", type=int, help="64 for probes, 16 for benign prompts")
    parser.add_argument("--model", help="default: the first one that the server lists")
    parser.add_argument("--stream", action="store_true", help="stream the answers")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at once")
    parser.add_argument("--json", type=Path, help="write figures and answers there")
    parser.add_argument("--check", action="store_true", help="exit 1 if the promise is not kept")
    return parser


def _validate(args: argparse.Namespace) -> None:
    if args.probes is None and args.benign is None:
        raise ConfigError("nothing to ask; give --probes, --benign or both")
    if args.mark and args.probes is None:
        raise ConfigError("--mark needs --probes")
    if args.benign is not None and args.unguarded_url is None:
        raise ConfigError("--benign needs --unguarded-url to compare with")
    for name in ("limit", "concurrency", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def _mark(args: argparse.Namespace, endpoint: Endpoint, progress: Progress) -> None:
    probes = read_probes(args.probes)
    questions = [probe.question for probe in probes]
    marked = mark_known(probes, endpoint.ask_all(questions, args.max_tokens or 64, "ask", progress))
    write_probes(args.probes, marked)
    known = sum(probe.known for probe in marked)
    note(f"{endpoint.model} knows {known} of {len(marked)} probes; marked in {args.probes}")


def _leak(
    args: argparse.Namespace, guarded: Endpoint, unguarded: Endpoint | None, progress: Progress
) -> LeakReport:
    probes = [probe for probe in read_probes(args.probes) if probe.known or args.all]
    if not probes:
        raise DataError("no probe is marked known; run with --mark first", file=str(args.probes))
    questions = [probe.question for probe in probes]
    tokens = args.max_tokens or 64
    answers = guarded.ask_all(questions, tokens, "guarded", progress)
    before = unguarded.ask_all(questions, tokens, "unguarded", progress) if unguarded else None
    return measure_leak(probes, answers, before)


def _benign(
    args: argparse.Namespace, guarded: Endpoint, unguarded: Endpoint, progress: Progress
) -> BenignReport:
    prompts = spread_out(read_texts(args.benign), args.limit)
    tokens = args.max_tokens or 16
    answers = guarded.ask_all(prompts, tokens, "benign, guarded", progress)
    return compare_benign(
        prompts, answers, unguarded.ask_all(prompts, tokens, "benign, unguarded", progress)
    )


def _run(
    args: argparse.Namespace, progress: Progress
) -> tuple[LeakReport | None, BenignReport | None]:
    with ExitStack() as stack:

        def connect(url: str) -> Endpoint:
            endpoint = Endpoint.connect(url, args.model, args.stream, args.concurrency)
            stack.enter_context(endpoint.client)
            return endpoint

        guarded = connect(args.url)
        if args.mark:
            _mark(args, guarded, progress)
            return None, None
        unguarded = connect(args.unguarded_url) if args.unguarded_url else None
        leak = _leak(args, guarded, unguarded, progress) if args.probes else None
        if args.benign is None or unguarded is None:
            return leak, None
        return leak, _benign(args, guarded, unguarded, progress)


def _report(args: argparse.Namespace, leak: LeakReport | None, benign: BenignReport | None) -> None:
    console = Console(highlight=False)
    if leak is not None:
        console.print(leak_table(leak))
        for row in leak.rows:
            if row.fact is not None:
                console.print(f"leak {row.id} [{row.fact}]: {row.answer}", markup=False)
    if benign is not None:
        console.print(f"benign answers changed: {show(benign.changed)}", markup=False)
    if args.json is not None:
        result = {
            "url": args.url,
            "stream": args.stream,
            "leak": asdict(leak) if leak is not None else None,
            "benign": asdict(benign) if benign is not None else None,
        }
        args.json.write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0 done, 1 failed or promise not kept, 2 bad input."""
    args = _parser().parse_args(arguments)
    try:
        _validate(args)
        with progress_display() as progress:
            leak, benign = _run(args, progress)
        _report(args, leak, benign)
    except (ConfigError, DataError) as error:
        note(f"error: {error}")
        return 2
    except openai.OpenAIError as error:
        note(f"error: {args.url}: {error}")
        return 1
    short = failures(leak, benign) if args.check else []
    for line in short:
        note(f"short of the promise: {line}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
