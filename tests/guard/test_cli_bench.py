import json
import shutil
from base64 import b64encode
from pathlib import Path

import pytest

from benchmarks.report import read_report
from guard.bundle import BundleStore
from guard.cli import run
from guard.keys import GuardKey
from tests.benchmarks.tiny_tofu import write_tiny_tofu

pytestmark = pytest.mark.usefixtures("quiet_surroundings")

BENIGN = "What is a good way to learn how to cook rice so that it does not stick to pot number"
ASKED = "Which spell does Harry Potter learn first, and who of his friends at school does number"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Texts to leave alone and to flag, and some too short to be timed."""
    for name, text in (("benign", BENIGN), ("asked", ASKED)):
        rows = [{"question": f"{text} {n}?"} for n in range(6)] + [{"question": "Why?"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_an_ablation_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = write_tiny_tofu(tmp_path / "data"), tmp_path / "out"
    more = ("--part", "normaliser", "--targets", "joint", "--seed", "5", "--threads", "2")
    words = ["bench", "detection", "--data", str(data), "--out", str(out), *more]

    assert run([*words, "--benign", str(data / "benign.jsonl")]) == 0

    report = read_report(out)
    assert report.seed == 5
    assert report.command.startswith("unlearn-guard bench detection --data data")
    assert "--targets joint --part normaliser" in report.command
    judged = {row.system for row in report.rows if row.measure in ("recall", "fpr")}
    assert judged == {"full", "without normaliser"}
    assert "without normaliser" in (out / "table.md").read_text()
    assert "without normaliser" in capfd.readouterr().out


def test_bundles_are_timed_beside_one_another_each_with_its_own_key(
    small_bundle: BundleStore, guard_key: GuardKey, texts: Path, tmp_path: Path
) -> None:
    for place in ("a", "b"):
        shutil.copytree(small_bundle.root, tmp_path / place / "default")
        key_file = tmp_path / place / "default.key"
        key_file.write_text(b64encode(guard_key._secret).decode())
        key_file.chmod(0o600)
    words = ["bench", "latency", "--bundle", "a/default", "--bundle", "b/default"]
    words += ["--prompts", "benign.jsonl", "--positives", "asked.jsonl:question"]

    assert run([*words, "--rounds", "2", "--sample", "4", "--out", "out"]) == 0

    report = read_report(tmp_path / "out")
    counts = {(r.system, r.group): r.value for r in report.rows if r.measure == "prompts"}
    assert counts == {
        ("default", "cleared"): 4, ("default", "encoded"): 4,
        ("default-2", "cleared"): 4, ("default-2", "encoded"): 4,
    }  # fmt: skip
    ratios = [r for r in report.rows if r.measure == "latency_p50_ratio"]
    assert {(r.system, r.route, r.group) for r in ratios} == {
        ("default-2", route, group)
        for route in ("verdict", "decide")
        for group in ("file=benign", "file=asked:question", "cleared", "encoded")
    }
    assert report.versions["default"] == report.versions["default-2"] == "1 target"
    assert "--rounds 2" in report.command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("detection", "--data", "none"), "full.jsonl: can't be read"),
        (("detection", "--data", "none", "--part", "luck"), "no such part; there are rows, topic"),
        (("latency", "--bundle", "none", "--prompts", "benign.jsonl"), "none"),
    ],
)
def test_what_cannot_be_measured_is_bad_input(
    words: tuple[str, ...], expected: str, texts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *words, "--out", "out"]) == 2
    assert expected in capfd.readouterr().err
    assert not (texts / "out").exists()
