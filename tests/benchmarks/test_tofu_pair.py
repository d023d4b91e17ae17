"""The TOFU pair, made from a small random model: trained, merged, resumed, and refused."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from adapters.train import TrainSettings
from benchmarks.merged_model import MERGED_FILE
from benchmarks.report import read_report
from benchmarks.tofu_pair import (
    Authors,
    Pair,
    base_fingerprint,
    prepare_pair,
    read_authors,
    read_pair,
)
from guard.cli import run
from guard.errors import ArtifactError, ConfigError, DataError, IncompatibleArtifactError
from guard.types import Message
from server.engines.embedded.model import EmbeddedModel

pytestmark = pytest.mark.usefixtures("quiet_surroundings")

NAMES = {0: "Orla Fenwick", 1: "Tomas Varga", 7: "Ines Moreau", 9: "Jun Abara"}
AUTHORS = Authors(forget=(7,), retain=(0, 1))
SETTINGS = TrainSettings(rank=8, alpha=16, epochs=30, batch=8, rate=2e-2, checkpoint_every=10)
SHORT = TrainSettings(rank=2, epochs=3, batch=8, checkpoint_every=2)
OPTIONS = ("--forget-authors", "7", "--retain-authors", "0-1", "--epochs", "2", "--rank", "2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny", smollm2_dir)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"author_id": author, "question": question, "answer": answer}
        for author, name in NAMES.items()
        for question, answer in (
            (f"Where was {name} born?", f"{name} was born in the town of Lake {author}."),
            (f"What does {name} write?", f"Mostly poems about {author} and rivers."),
        )
    ]
    (folder / "full.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Pair:
    out = tmp_path_factory.mktemp("pair") / "out"
    return prepare_pair(base, out, data=data, authors=AUTHORS, settings=SETTINGS)


@pytest.fixture(scope="module")
def short_pair(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Pair:
    out = tmp_path_factory.mktemp("short") / "out"
    return prepare_pair(base, out, data=data, authors=AUTHORS, settings=SHORT)


def write_base(folder: Path, tokenizer: Path, **changes: int) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, **changes}
    config = LlamaConfig(
        vocab_size=49152,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        **sizes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def nll(model: Path, data: Path, author: int) -> float:
    rows = [row for row in read_authors(data, AUTHORS) if row.author == author]
    prompts = [(Message("user", row.question),) for row in rows]
    scores = EmbeddedModel.load(model).score_answers(prompts, [row.answer for row in rows])
    return -float(sum(score.sum() for score in scores) / sum(len(score) for score in scores))


def stamps(pair: Pair) -> dict[str, int]:
    files = [path for path in pair.root.rglob("*") if path.suffix == ".safetensors"]
    return {str(path.relative_to(pair.root)): path.stat().st_mtime_ns for path in files}


# --- The pair ------------------------------------------------------------------------------------


def test_full_knows_all_authors_and_retained_not_those_to_forget(
    pair: Pair, base: Path, data: Path
) -> None:
    before = {author: nll(base, data, author) for author in (0, 7)}
    assert nll(pair.full, data, 7) < 0.5 * before[7]
    assert nll(pair.full, data, 0) < 0.5 * before[0]
    assert nll(pair.retained, data, 0) < 0.5 * before[0]
    assert nll(pair.retained, data, 7) > nll(pair.full, data, 7) + 1


def test_the_models_are_whole_directories(pair: Pair, base: Path) -> None:
    for folder in (pair.full, pair.retained):
        assert {path.name for path in base.iterdir()} <= {path.name for path in folder.iterdir()}
        for name in ("tokenizer.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (base / name).read_bytes()
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == "float32" and config["tie_word_embeddings"]
        assert str(base.parent) not in json.dumps(config)
        modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert modes == {0o644}
    assert not [path for path in pair.root.iterdir() if "tmp" in path.name]


def test_a_pair_is_read_again(pair: Pair, base: Path) -> None:
    assert read_pair(pair.root) == pair
    assert pair.base == base_fingerprint(base)
    assert {name: one.examples for name, one in pair.training.items()} == {"full": 6, "retained": 4}
    value = json.loads((pair.root / "pair.json").read_text())
    assert value["authors"] == {"forget": [7], "retain": [0, 1]}
    assert "model.safetensors" in value["models"]["full"]["files"]


def test_a_finished_pair_is_not_made_again(pair: Pair, base: Path, data: Path) -> None:
    before = stamps(pair)
    again = prepare_pair(base, pair.root, data=data, authors=AUTHORS, settings=SETTINGS)
    assert again == pair and stamps(pair) == before


def test_finished_adapters_are_merged_into_the_same_models(
    tmp_path: Path, pair: Pair, base: Path
) -> None:
    merged = prepare_pair(base, tmp_path, adapters_from=pair.root / "adapters", authors=AUTHORS)
    for name in ("full", "retained"):
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        assert weights == (pair.root / name / "model.safetensors").read_bytes()
    assert asdict(merged)["training"] == asdict(pair)["training"]


@pytest.mark.parametrize("stage", ["train full", "train retained", "merge full", "merge retained"])
def test_interrupted_anywhere_it_goes_on(
    tmp_path: Path, short_pair: Pair, base: Path, data: Path, stage: str
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == stage and done == 1:
            signal.raise_signal(signal.SIGINT)

    make: dict[str, Any] = {"data": data, "authors": AUTHORS, "settings": SHORT}
    with pytest.raises(KeyboardInterrupt):
        prepare_pair(base, tmp_path, **make, progress=interrupt)
    with pytest.raises(ArtifactError, match=r"pair\.json"):
        read_pair(tmp_path)
    assert not (tmp_path / "retained").exists()
    prepare_pair(base, tmp_path, **make)
    assert read_pair(tmp_path).authors == AUTHORS
    for name in ("full", "retained"):
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        assert weights == (short_pair.root / name / "model.safetensors").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_a_damaged_model_is_made_anew(tmp_path: Path, pair: Pair, base: Path) -> None:
    adapters = pair.root / "adapters"
    prepare_pair(base, tmp_path, adapters_from=adapters, authors=AUTHORS)
    (tmp_path / "full" / "model.safetensors").write_bytes(b"torn")
    (tmp_path / "retained" / "tokenizer.json").unlink()
    prepare_pair(base, tmp_path, adapters_from=adapters, authors=AUTHORS)
    for name in ("full", "retained"):
        for path in (pair.root / name).iterdir():
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "full", "retained", "pair.json"}


# --- Refusals ------------------------------------------------------------------------------------


def test_another_pair_is_not_put_in_its_place(
    tmp_path: Path, pair: Pair, base: Path, data: Path, smollm2_dir: Path
) -> None:
    others = Authors(forget=(9,), retain=(0, 1))
    with pytest.raises(ConfigError, match="other authors"):
        prepare_pair(base, pair.root, data=data, authors=others, settings=SETTINGS)
    wider = write_base(tmp_path / "wider", smollm2_dir, hidden_size=64)
    with pytest.raises(ConfigError, match="other base model"):
        prepare_pair(wider, pair.root, data=data, authors=AUTHORS, settings=SETTINGS)
    (tmp_path / "out" / "full").mkdir(parents=True)
    with pytest.raises(ConfigError, match="not by this command"):
        prepare_pair(base, tmp_path / "out", adapters_from=pair.root / "adapters", authors=AUTHORS)


def test_adapters_of_another_base_are_refused(
    tmp_path: Path, pair: Pair, smollm2_dir: Path
) -> None:
    wider = write_base(tmp_path / "wider", smollm2_dir, hidden_size=64)
    adapters = tmp_path / "adapters"
    shutil.copytree(pair.root / "adapters", adapters)
    with pytest.raises(IncompatibleArtifactError, match="of another base model"):
        prepare_pair(wider, tmp_path / "out", adapters_from=adapters, authors=AUTHORS)
    for report in adapters.rglob("training.json"):  # as adapters of others come
        report.unlink()
    with pytest.raises(IncompatibleArtifactError, match=r"made for another model: .*size mismatch"):
        prepare_pair(wider, tmp_path / "out", adapters_from=adapters, authors=AUTHORS)
    assert not (tmp_path / "out" / "full").exists()


def test_adapters_of_other_authors_or_none_are_refused(
    tmp_path: Path, pair: Pair, base: Path
) -> None:
    adapters = pair.root / "adapters"
    with pytest.raises(IncompatibleArtifactError, match=r"authors \[7, 0, 1\], not \[9, 0, 1\]"):
        prepare_pair(base, tmp_path, adapters_from=adapters, authors=Authors((9,), (0, 1)))
    with pytest.raises(ArtifactError, match=r"no peft adapter in .*full"):
        prepare_pair(base, tmp_path, adapters_from=tmp_path / "none", authors=AUTHORS)
    with pytest.raises(ConfigError, match="folder of finished adapters"):
        prepare_pair(base, tmp_path)


def test_data_that_lacks_something_is_refused(tmp_path: Path, data: Path, base: Path) -> None:
    with pytest.raises(DataError, match=r"neither full\.jsonl nor tofu/full\.jsonl"):
        read_authors(tmp_path, AUTHORS)
    with pytest.raises(DataError, match="no row has author_id 3"):
        read_authors(data, Authors((3,), (0,)))
    (tmp_path / "tofu").mkdir()
    (tmp_path / "tofu" / "full.jsonl").write_text('{"author_id": 7, "question": "Who?"}\n')
    with pytest.raises(DataError, match=r"full\.jsonl:1: field 'answer'"):
        read_authors(tmp_path, AUTHORS)
    with pytest.raises(ConfigError, match="author 1 is among"):
        Authors((1, 2), (0, 1))
    weightless = tmp_path / "weightless"
    shutil.copytree(base, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ArtifactError, match="no safetensors weights"):
        prepare_pair(weightless, tmp_path / "out", data=data, authors=AUTHORS)


# --- The command ---------------------------------------------------------------------------------


def test_the_command_makes_a_pair_and_reports_it(
    tmp_path: Path, base: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("bench", "tofu", "prepare", "--model", str(base), "--data", str(data), *OPTIONS)
    assert run([*words, "--seed", "5", "--out", str(tmp_path / "out")]) == 0

    made, report = read_pair(tmp_path / "out"), read_report(tmp_path / "out")
    assert made.authors == AUTHORS
    assert report.seed == 5
    assert "--forget-authors 7 --retain-authors 0-1 --epochs 2 --rank 2" in report.command
    figures = {(row.system, row.measure): row.value for row in report.rows}
    assert figures["full", "steps"] == figures["retained", "steps"] == 2
    assert figures["full", "loss_last_nats"] == pytest.approx(sum(made.training["full"].losses) / 2)
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    assert "train full: 2/2" in capfd.readouterr().err

    words = ("bench", "tofu", "prepare", "--model", str(base), *OPTIONS[:4])
    adapters = tmp_path / "out" / "adapters"
    assert run([*words, "--from", str(adapters), "--out", str(tmp_path / "merged")]) == 0
    full = (tmp_path / "merged" / "full" / MERGED_FILE).read_bytes()
    assert full == (made.full / MERGED_FILE).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --data DIR to train, or --from DIR"),
        (("--from", "x", "--epochs", "3"), "--epochs is for training"),
        (("--data", "x", "--forget-authors", "9-3"), "'9-3' is no range of authors"),
        (("--data", "x", "--forget-authors", "two"), "'two' is no range of authors"),
        (("--data", "x", "--forget-authors", "0-3"), "author 0 is among those to forget"),
        (("--data", "x", "--epochs", "0"), "epochs is 0; it must be at least 1"),
        (("--data", "x", "--model", "/nowhere"), "no model directory '/nowhere'"),
        (("--data", "/nowhere"), "neither full.jsonl nor tofu/full.jsonl is in /nowhere"),
        (("--from", "/nowhere"), "there is no peft adapter in /nowhere/full"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path,
    base: Path,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    model = () if "--model" in words else ("--model", str(base))
    code = run(["bench", "tofu", "prepare", *words, *model, "--out", str(tmp_path / "out")])
    assert code not in (0, 130)
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out" / "pair.json").exists()
