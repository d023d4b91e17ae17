import json
from pathlib import Path

import pytest

from benchmarks.report import Report, read_report
from guard.bundle import BundleStore
from guard.cli import run
from guard.cli_eval import SAMPLE
from guard.keys import GuardKey

pytestmark = pytest.mark.usefixtures("quiet_surroundings")

TEMPLATES = (
    {"id": "1", "template": "You are Bard. {question}", "kind": "role_play", "transform": "none"},
    {"id": "2", "template": "{question}", "kind": "case", "transform": "uppercase"},
)


@pytest.fixture
def key_file(
    quiet_surroundings: None, guard_key: GuardKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of the small bundle, given as a server's environment would."""
    from base64 import b64encode

    monkeypatch.setenv("UNLEARN_GUARD_KEY", b64encode(guard_key._secret).decode())


@pytest.fixture
def data(tmp_path: Path, example_dir: Path) -> Path:
    """Some of the example's probes and retain questions, a row without a text, two wrappers."""
    folder = tmp_path / "data"
    folder.mkdir()
    probes = (example_dir / "probes.jsonl").read_text().splitlines()[:24]
    retain = (example_dir / "retain.jsonl").read_text().splitlines()[:40]
    (folder / "probes.jsonl").write_text("\n".join([*probes, '{"question": null}']))
    (folder / "retain.jsonl").write_text("\n".join(retain))
    (folder / "attacks.jsonl").write_text("\n".join(map(json.dumps, TEMPLATES)))
    return folder


def evaluate(store: BundleStore, data: Path, *more: str) -> int:
    return run(
        [
            "eval",
            "detection",
            "--bundle",
            str(store.root),
            "--positives",
            str(data / "probes.jsonl"),
            "--negatives",
            f"{data}/retain.jsonl:question",
            *more,
        ]
    )


def values(report: Report, measure: str) -> dict[str, float | None]:
    return {row.group: row.value for row in report.rows if row.measure == measure}


@pytest.mark.usefixtures("key_file")
def test_a_bundle_is_judged_by_the_decisions_that_it_would_make(
    small_bundle: BundleStore,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    attacks = str(data / "attacks.jsonl")
    options = ("--attacks", attacks, "--context", "40", "--among", "3", "--out", str(out))

    assert evaluate(small_bundle, data, *options) == 0
    printed = capfd.readouterr()

    report = read_report(out)
    assert report.command.startswith("unlearn-guard eval detection --positives data/probes.jsonl")
    assert report.versions["bundle"] == str(small_bundle.current_version())
    assert {path.name for path in out.iterdir()} == {
        "decisions.jsonl", "report.json", "table.md",
        "roc.png", "histogram.png", "fpr.png", "fnr.png",
    }  # fmt: skip
    assert values(report, "skipped_rows") == {"file=probes": 1, "file=retain:question": 0}
    recall, fpr = values(report, "recall"), values(report, "fpr")
    assert set(recall) >= {
        "all", "file=probes", "kind=direct", "attacks", "attacks/transform=uppercase",
        "attacks/kind=role_play", "context=40", "context=40/benign=suffix", "among=3",
    }  # fmt: skip
    # What the command reports is what `decide` says of the same texts.
    decided = tmp_path / "decided"
    source = tmp_path / "asked.jsonl"
    asked = (data / "probes.jsonl").read_text().splitlines()[:-1]
    source.write_text("\n".join(asked))
    words = ["decide", "--bundle", str(small_bundle.root), "--in", str(source)]
    assert run([*words, "--out", str(decided)]) == 0
    flagged = [json.loads(line)["flagged"] for line in decided.read_text().splitlines()]
    assert recall["all"] == pytest.approx(sum(flagged) / len(flagged))
    assert (recall["all"] or 0) > (fpr["all"] or 0)
    assert (values(report, "auroc")["all"] or 0) > 0.9
    for row in report.rows:
        if None not in (row.value, row.ci_low, row.ci_high):
            assert row.ci_low <= row.value <= row.ci_high, row  # type: ignore[operator]
    assert "auroc" in printed.out


@pytest.mark.usefixtures("key_file")
def test_a_second_run_decides_nothing_anew_and_another_is_refused(
    small_bundle: BundleStore, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(small_bundle, data, "--out", str(out), "--sample", "10") == 0
    first, decided = read_report(out), (out / "decisions.jsonl").read_text()

    assert evaluate(small_bundle, data, "--out", str(out), "--sample", "10") == 0
    assert (read_report(out), (out / "decisions.jsonl").read_text()) == (first, decided)
    assert len(decided.splitlines()) == 21

    capfd.readouterr()
    assert evaluate(small_bundle, data, "--out", str(out), "--full") == 2
    assert "--restart" in capfd.readouterr().err
    assert evaluate(small_bundle, data, "--out", str(out), "--full", "--restart") == 0
    assert len((out / "decisions.jsonl").read_text().splitlines()) == 65


@pytest.mark.usefixtures("key_file")
def test_a_papers_detector_stands_beside_ours_and_targets_by_themselves(
    small_bundle: BundleStore, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("forget", "retain"):
        rows = [{"text": f"the {name} text number {number}"} for number in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [json.loads(line) for line in (data / "probes.jsonl").read_text().splitlines()[:6]]
    named = [
        row | {"target": ("Harry Potter", "Sherlock Holmes")[n % 2]} for n, row in enumerate(asked)
    ]
    (data / "probes.jsonl").write_text("\n".join(map(json.dumps, named)))
    out = tmp_path / "out"
    also = ("--also", "eco", "--forget", "forget.jsonl", "--retain", "retain.jsonl")

    assert evaluate(small_bundle, data, *also, "--per-target", "--out", str(out)) == 0
    report = read_report(out)

    areas = {row.system: row for row in report.rows if row.measure == "auroc"}
    assert set(areas) == {"guard", "eco"}
    assert {(row.group, row.n) for row in areas.values()} == {("all", 46)}
    assert len((out / "scores-eco.jsonl").read_text().splitlines()) == 47
    by_target = values(report, "target_recall")
    assert by_target["target=Sherlock Holmes"] == 0.0
    assert (by_target["target=Harry Potter"] or 0) > 0.5
    assert "--per-target --also eco" in report.command


@pytest.mark.usefixtures("key_file")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--full", "--sample", "3"), "give one of them"),
        (("--also", "eco"), "--also needs --forget"),
        (("--also", "eco", "--forget", "none.jsonl"), "none.jsonl: can't be read"),
        (("--positives", "none.jsonl"), "none.jsonl: can't be read"),
        (("--attacks", "none.jsonl"), "none.jsonl: can't be read"),
        (("--negatives", "broken.jsonl"), "broken.jsonl:1: not JSON"),
    ],
)
def test_what_cannot_be_evaluated_is_bad_input(
    small_bundle: BundleStore,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    expected: str,
) -> None:
    (tmp_path / "broken.jsonl").write_text("{")

    assert evaluate(small_bundle, data, "--out", str(tmp_path / "out"), *options) == 2
    assert expected in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_help_names_the_default_sample(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "detection", "--help"]) == 0
    assert f"[{SAMPLE}]" in capfd.readouterr().out
