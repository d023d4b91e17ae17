import base64
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guard.bundle import BundleStore, TargetEntry
from guard.cli import run
from guard.keys import GuardKey
from guard.ledger import Ledger

PROGRAM = [sys.executable, "-c", "from guard.cli import main; main()"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("UNLEARN_GUARD_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def clean_logging() -> Iterator[None]:
    """Commands set up logging for the whole process; give it back."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with two targets; its files are not those of a detector."""
    root = tmp_path / "bundles" / "default"
    key = GuardKey.load_or_create(tmp_path / "bundles" / "default.key", create=True)
    for name in ("ann", "bob"):
        with BundleStore(root, key).transaction() as draft:
            draft.write(f"targets/{name}/head.safetensors", name.encode())
            draft.manifest.targets[name] = TargetEntry(
                name=name, status="enforced", rows=3, detector={"threshold": 0.5}, notes=["a note"]
            )
        Ledger(root / "ledger.jsonl", key).append("bundle", action="target add", target=name)
    return root


def call(*words: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *words], capture_output=True, text=True, timeout=120, check=False, **more
    )  # type: ignore[call-overload,no-any-return]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_loads_nothing_heavy() -> None:
    heavy = (
        "torch transformers sklearn onnxruntime faiss numpy pydantic starlette aiohttp uvicorn rich"
    )
    code = (
        "import sys\nfrom guard.cli import run\nassert run(['--help']) == 0\n"
        f"loaded = set({heavy!r}.split()) & set(sys.modules)\nassert not loaded, loaded"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    for name in "target serve chat decide doctor config bundle ledger model engine".split():
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["target", "add", "--help"],
        ["target", "list", "-h"],
        ["serve", "--help"],
        ["chat", "--help"],
        ["decide", "--help"],
        ["engine", "--help"],
        ["--version"],
    ],
)
def test_help_and_version_are_no_errors(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    code, out, err = said(capsys, *words)

    assert (code, err) == (0, "")
    assert out.strip()


@pytest.mark.parametrize(
    "words",
    [
        ["target", "list"],
        ["target", "show", "ann"],
        ["target", "remove", "ann"],
        ["bundle", "show"],
        ["bundle", "gc"],
        ["serve"],
        ["chat"],
        ["decide", "--in", "-"],
    ],
)
def test_without_a_bundle_every_command_says_how_to_make_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]
) -> None:
    code, out, err = said(capsys, *words, "--bundle", "bundles/none")

    assert (code, out) == (2, "")
    assert err.startswith("error: no bundle at bundles/none: make one with `unlearn-guard target")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "No such command"),
        (["config", "--prot", "1"], "No such option"),
        (["target", "add", "x"], "--forget"),
        (["target", "add", "x", "--forget", "nothing.jsonl"], "nothing.jsonl: can't be read"),
        (["target", "add", "../x", "--forget", "nothing.jsonl"], "target name '../x'"),
        (["target", "add", "x", "--forget", "bad.jsonl"], "bad.jsonl:2: field 'answer': missing"),
        (
            ["target", "add", "x", "--forget", "good.jsonl", "--benign", "bad.jsonl"],
            "bad.jsonl:1: field 'question'",
        ),
        (["target", "add", "x", "--forget", "good.jsonl", "--fpr-budget", "2"], "fpr_budget"),
        (["--config", "nothing.yaml", "config"], "nothing.yaml"),
        (["--config", "bad.yaml", "config"], "unknown setting 'prot'; did you mean port"),
        (["bundle", "gc", "--keep", "0"], "--keep"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "good.jsonl").write_text('{"question": "Q?", "answer": "A"}\n')
    (tmp_path / "bad.jsonl").write_text(
        '{"question": "Q?", "answer": "A", "text": "x"}\n{"question": "Q?"}\n'
        if "--benign" in words
        else '{"question": "Q?", "answer": "A"}\n{"question": "Q?"}\n'
    )
    (tmp_path / "bad.yaml").write_text("prot: 1\n")
    before = sorted(tmp_path.rglob("*"))

    code, out, err = said(capsys, *words)

    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_variable_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARN_GUARD_BUNDEL", "x")

    code, _, err = said(capsys, "config")

    assert code == 2
    assert "did you mean UNLEARN_GUARD_BUNDLE" in err


def test_config_shows_value_and_source_and_no_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "guard.yaml").write_text("port: 1234\nkey: SECRET\n")
    monkeypatch.setenv("UNLEARN_GUARD_SEED", "5")

    code, out, err = said(capsys, "--config", "guard.yaml", "config", "--json", "--engine", "vllm")

    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["port"] == {"value": 1234, "source": "file guard.yaml"}
    assert shown["engine"] == {"value": "vllm", "source": "flag"}
    assert shown["seed"]["source"] == "environment UNLEARN_GUARD_SEED"
    code, table, _ = said(capsys, "--config", "guard.yaml", "config")
    assert "1234" in table
    assert "SECRET" not in out + table


def test_list_and_show(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, err = said(capsys, "target", "list", "--json")
    assert (code, err) == (0, "")
    assert [entry["name"] for entry in json.loads(out)["targets"]] == ["ann", "bob"]
    code, out, _ = said(capsys, "target", "list")
    assert (code, "ann" in out, "enforced" in out) == (0, True, True)
    code, out, _ = said(capsys, "target", "show", "ann", "--json")
    assert json.loads(out)["detector"] == {"threshold": 0.5}
    assert json.loads(out)["files"] == {"targets/ann/head.safetensors": 3}
    code, out, _ = said(capsys, "target", "show", "ann")
    assert (code, "detector.threshold" in out, "a note" in out) == (0, True, True)
    code, out, _ = said(capsys, "bundle", "show", "--json")
    assert json.loads(out)["versions"] == [1, 2]
    code, out, _ = said(capsys, "bundle", "show")
    assert (code, "key_id" in out) == (0, True)


def test_an_unknown_target_names_the_nearest(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    for command in ("show", "remove"):
        code, _, err = said(capsys, "target", command, "anm")
        assert code == 2
        assert "no target 'anm'" in err
        assert "did you mean 'ann'? (there: ann, bob)" in err


def test_a_name_that_is_taken_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    code, _, err = said(capsys, "target", "add", "ann", "--forget", "nothing.jsonl")

    assert code == 2
    assert "holds a target 'ann' already" in err


def test_damaged_detectors_do_not_keep_a_target(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    code, _, err = said(capsys, "target", "remove", "ann")

    assert code == 0
    assert "may be hit by more requests than before" in err
    assert "the head of target 'ann' cannot be read" in err


def test_remove_then_gc_leaves_nothing_of_a_target(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    code, _, err = said(capsys, "target", "remove", "ann")
    assert code == 0, err
    assert "bundle gc" in err
    assert list(BundleStore(bundle).current().manifest.targets) == ["bob"]

    code, out, _ = said(capsys, "bundle", "gc", "--json")
    assert json.loads(out) == {"deleted": ["000001", "000002"], "left": ["000003"]}
    assert not list(bundle.rglob("*ann*"))
    rows = [json.loads(line) for line in (bundle / "ledger.jsonl").read_text().splitlines()]
    assert [row["action"] for row in rows] == ["target add", "target add", "target remove", "gc"]
    assert said(capsys, "ledger", "verify")[0] == 0


def test_another_key_is_refused(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    GuardKey.load_or_create(tmp_path / "other.key", create=True)

    code, _, err = said(capsys, "target", "remove", "ann", "--key-file", "other.key")
    assert code == 2
    assert "made with key" in err
    (tmp_path / "bundles" / "default.key").unlink()
    code, _, err = said(capsys, "target", "remove", "ann")
    assert code == 2
    assert "no key file at" in err
    assert not (tmp_path / "bundles" / "default.key").exists()


def test_the_key_may_come_from_the_environment(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "bundles" / "default.key"
    monkeypatch.setenv("UNLEARN_GUARD_KEY", file.read_text().strip())
    file.unlink()

    assert said(capsys, "target", "remove", "ann")[0] == 0
    monkeypatch.setenv("UNLEARN_GUARD_KEY", base64.b64encode(b"short").decode())
    assert said(capsys, "target", "remove", "bob")[0] == 2


def test_ledger_verify_tells_what_is_wrong(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    code, out, err = said(capsys, "ledger", "verify")
    assert (code, out) == (0, "")
    assert "2 rows, intact, all signed" in err
    code, out, _ = said(capsys, "ledger", "verify", "--json")
    assert json.loads(out)["authentic"] is True

    ledger = bundle / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("ann", "eve"))
    code, out, _ = said(capsys, "ledger", "verify")
    assert code == 1
    assert out.startswith("line 1: altered")
    code, out, _ = said(capsys, "ledger", "verify", "--ledger", "elsewhere.jsonl")
    assert code == 1


def test_a_damaged_bundle_is_a_failure(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    path = bundle / "000002/targets/bob/head.safetensors"
    path.chmod(0o644)
    path.write_bytes(b"eve")

    code, _, err = said(capsys, "bundle", "show")

    assert code == 1
    assert "head.safetensors was altered" in err


def test_decide_needs_an_input_that_can_be_read(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    code, _, err = said(capsys, "decide", "--in", "nothing.jsonl")
    assert code == 2
    assert "nothing.jsonl: can't be read" in err
    (tmp_path / "in.jsonl").write_text('{"text": "a"}')
    code, _, err = said(capsys, "decide", "--in", "in.jsonl", "--out", "in.jsonl")
    assert code == 2
    assert "choose another" in err
    assert (tmp_path / "in.jsonl").read_text() == '{"text": "a"}'


def test_vllm_needs_an_upstream(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, _, err = said(capsys, "serve", "--engine", "vllm")

    assert code == 2
    assert "--upstream" in err


def test_doctor_without_a_bundle_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "doctor", "--json")

    assert (code, err) == (2, "")
    report = json.loads(out)
    checks = {check["check"]: check["status"] for check in report["checks"]}
    assert report["ok"] is False
    assert checks["installation"] == "ok"
    assert checks["bundle"] == "failed"
    assert checks["self-check"] == "skipped"


def test_doctor_finds_a_bundle_for_another_model(
    capsys: pytest.CaptureFixture[str], bundle: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "bundles" / "default.key").chmod(0o644)

    code, out, _ = said(capsys, "doctor", "--json", "--model", str(smollm2_dir))

    assert code == 3
    checks = {check["check"]: check for check in json.loads(out)["checks"]}
    assert checks["model"]["status"] == "failed"
    assert checks["key"]["status"] == "warning"
    assert checks["ledger"]["status"] == "ok"
    assert said(capsys, "doctor", "--model", str(smollm2_dir))[0] == 3


def test_the_prepared_model_is_the_only_output(
    capsys: pytest.CaptureFixture[str], smollm2_dir: Path
) -> None:
    code, out, _ = said(capsys, "model", "prepare")

    assert code == 0
    assert out == f"{smollm2_dir}\n"


def test_exit_codes_of_the_real_program(bundle: Path) -> None:
    assert call("target", "list").returncode == 0
    assert call("target", "show", "eve").returncode == 2
    assert call("ledger", "verify", "--ledger", "nothing").returncode == 1
    assert call("nonsense").returncode == 2


def test_an_internal_error_is_one_line_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    def crash(self: BundleStore) -> None:
        raise ZeroDivisionError("what?")

    monkeypatch.setattr(BundleStore, "current", crash)
    code, _, err = said(capsys, "target", "list")
    assert code == 1
    assert err.startswith("internal error: ZeroDivisionError: what?")
    assert "Traceback" not in err
    code, _, err = said(capsys, "-v", "-v", "target", "list")
    assert "Traceback" in err


def test_a_closed_pipe_is_no_failure(bundle: Path) -> None:
    with subprocess.Popen(
        [*PROGRAM, "config", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_an_interrupted_command_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "forget.jsonl")
    process = subprocess.Popen(
        [*PROGRAM, "target", "add", "x", "--forget", "forget.jsonl"],
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background inherits that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Opening for writing without waiting works as soon as the command waits for a writer.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            descriptor = os.open(tmp_path / "forget.jsonl", os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(descriptor)

    assert process.returncode == 130
    assert err.startswith("interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["forget.jsonl"]


def test_many_misses_are_explained_and_few_are_not() -> None:
    from guard.cli_target import _miss_rate

    few = {"recall": {"rate": 0.97, "interval95": [0.9, 0.99]}, "held_out": True}
    many = {"recall": {"rate": 0.0, "interval95": [0.0, 0.1]}, "held_out": True}
    assert "\n" not in _miss_rate(few)
    assert "100.0% (90.0% to 100.0%)\n" in _miss_rate(many) and "names nobody" in _miss_rate(many)
