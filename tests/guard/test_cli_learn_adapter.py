"""`learn adapter` and `target route` as commands: what they take, refuse, show and leave alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard.bundle import BundleStore, TargetEntry
from guard.cli import run
from guard.keys import GuardKey
from guard.ledger import Ledger

pytestmark = pytest.mark.usefixtures("quiet_surroundings")

REASON = "chosen by evaluation on 3 forget rows: distance 0.12"
OUTCOME = tuple[int, str, str]


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """A bundle with two targets, one with an adapter; its files are not those of a detector."""
    root = tmp_path / "bundles" / "default"
    key = GuardKey.load_or_create(tmp_path / "bundles" / "default.key", create=True)
    store = BundleStore(root, key)
    with store.transaction() as draft:
        for name in ("ann", "bob"):
            draft.write(f"targets/{name}/head.safetensors", name.encode())
            draft.manifest.targets[name] = TargetEntry(
                name=name, status="enforced", rows=3, detector={"method": "guard"}
            )
        draft.write("targets/ann/adapter/adapter_model.safetensors", b"weights")
        ann = draft.manifest.targets["ann"]
        ann.adapter = {"rank": 8, "loss": "matched", "number": 1}
        ann.route, ann.route_reason = "adapt", REASON
        draft.manifest.targets["bob"].detector["method"] = "o3"
    Ledger(root / "ledger.jsonl", key).append("bundle", action="target add", target="ann")
    return store


def said(capsys: pytest.CaptureFixture[str], *words: str) -> OUTCOME:
    code = run(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def learn(capsys: pytest.CaptureFixture[str], *words: str) -> OUTCOME:
    given = ("--target", "ann", "--forget", "forget.jsonl", "--out", "out")
    return said(capsys, "learn", "adapter", *given, *words)


# --- learn adapter -------------------------------------------------------------------------------


def test_help_names_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "learn", "adapter", "--help")
    assert (code, err) == (0, "")
    for name in "--loss --loss-option --retain --orthogonality --route --resume --held-out".split():
        assert name in out
    assert "adapter" in said(capsys, "learn", "--help")[1]


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--loss", "match"], ["unknown loss 'match'", "did you mean 'matched'", "simnpo"]),
        (["--loss-option", "beta=1"], ["expected NAME=VALUE", "least_strength=0.5"]),
        (["--loss-option", "others"], ["expected NAME=VALUE", "others="]),
        (["--loss-option", "others=much"], ["others=much", "float"]),
        (["--loss-option", "answers=1.5"], ["answers=1.5", "int"]),
        (["--loss-option", "least_strength=2"], ["least_strength is 2.0", "(0, 1]"]),
        (["--loss", "npo", "--loss-option", "beta=0"], ["beta is 0.0", "above 0"]),
        (["--loss", "refusal", "--loss-option", "beta=1"], ["this loss has: none"]),
        (["--layers", "3"], ["--layers 3", "FIRST:END"]),
        (["--layers", "5:5"], ["--layers 5:5", "FIRST:END"]),
        (["--layers", "-1:5"], ["--layers -1:5"]),
        (["--layers", "a:b"], ["--layers a:b"]),
        (["--resume"], ["--resume", "nothing in out"]),
        (["--resume", "--restart"], ["--resume", "--restart", "one of them"]),
        (["--rank", "0"], ["--rank"]),
        (["--held-out", "0.95"], ["--held-out"]),
        (["--retain-weight", "0"], ["retain_weight is 0.0", "above 0"]),
        (["--route", "away"], ["--route"]),
    ],
)
def test_bad_input_is_told_before_anything_is_made(
    capsys: pytest.CaptureFixture[str],
    store: BundleStore,
    tmp_path: Path,
    words: list[str],
    messages: list[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = learn(capsys, *words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    for message in messages:
        assert message in " ".join(err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_nothing_to_resume(
    capsys: pytest.CaptureFixture[str], store: BundleStore, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = learn(capsys, "--resume")
    assert (code, "nothing in out" in err) == (2, True)


def test_without_a_bundle_it_says_how_to_make_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = learn(capsys, "--bundle", "bundles/none")
    assert code == 2
    assert "no bundle at bundles/none: make one with `unlearn-guard target" in err


# --- target route, target show --------------------------------------------------------------------


def test_show_says_route_and_reason(capsys: pytest.CaptureFixture[str], store: BundleStore) -> None:
    code, out, _ = said(capsys, "target", "show", "ann", "--json")
    shown = json.loads(out)
    assert (code, shown["route"], shown["route_reason"]) == (0, "adapt", REASON)
    assert (shown["weights"], shown["adapter"]["loss"]) == ("monotone", "matched")
    assert shown["files"]["targets/ann/adapter/adapter_model.safetensors"] == len(b"weights")
    code, table, _ = said(capsys, "target", "show", "ann")
    assert code == 0
    assert "route_reason" in table and "chosen by evaluation" in table
    _, other, _ = said(capsys, "target", "show", "bob", "--json")
    assert json.loads(other)["route_reason"] == "the default"


def test_a_route_is_set_shown_and_recorded(
    capsys: pytest.CaptureFixture[str], store: BundleStore
) -> None:
    code, out, err = said(capsys, "target", "route", "ann", "corrupt+adapt")
    assert (code, out) == (0, "")
    assert "target ann takes the route corrupt+adapt, weights monotone, from version 2" in err
    shown = json.loads(said(capsys, "target", "show", "ann", "--json")[1])
    assert (shown["route"], shown["route_reason"]) == ("corrupt+adapt", "set by hand")
    rows = (store.root / "ledger.jsonl").read_text().splitlines()
    row = json.loads(rows[-1])
    assert (row["action"], row["target"], row["route"]) == ("target route", "ann", "corrupt+adapt")
    code, _, err = said(capsys, "target", "route", "bob", "--weights", "o3-paper")
    assert (code, "route corrupt, weights o3-paper" in err) == (0, True)
    assert store.current().manifest.targets["bob"].route_reason == "the default"
    code, out, _ = said(capsys, "target", "list")
    assert "refuse" not in out
    assert said(capsys, "target", "route", "bob", "refuse")[0] == 0
    code, out, _ = said(capsys, "target", "list", "--json")
    routes = {entry["name"]: entry["route"] for entry in json.loads(out)["targets"]}
    assert routes == {"ann": "corrupt+adapt", "bob": "refuse"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ann"], "give a ROUTE, or --weights, or both"),
        (["ann", "away"], "'away'"),
        (["ann", "--weights", "o3"], "--weights"),
        (["anne", "refuse"], "anne"),
        (["bob", "adapt"], "learn adapter --target bob"),
        (["bob", "corrupt+adapt", "--weights", "o3-code"], "learn adapter --target bob"),
        (["ann", "--weights", "o3-paper"], "--detector o3"),
    ],
)
def test_a_route_that_cannot_be_taken_changes_nothing(
    capsys: pytest.CaptureFixture[str], store: BundleStore, words: list[str], message: str
) -> None:
    rows = (store.root / "ledger.jsonl").read_bytes()
    code, out, err = said(capsys, "target", "route", *words)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split()) and "Traceback" not in err
    assert store.current_version() == 1
    assert (store.root / "ledger.jsonl").read_bytes() == rows
