import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DistilBertConfig, PreTrainedTokenizerFast, RobertaConfig
from transformers.models.distilbert import DistilBertModel
from transformers.models.roberta import RobertaModel

from classifiers.benign import load_benign
from classifiers.eco import (
    ConformalSets,
    EcoArtifact,
    EcoClassifier,
    EcoConfig,
    EncoderFacts,
    Epoch,
    WindowCutter,
    conformal_quantile,
    conformal_sets,
    rows_needed,
)
from classifiers.eco_train import (
    _export,
    _load,
    _Trainer,
    best_epoch,
    class_weights,
    fit_eco,
    is_stalled,
    split_texts,
)
from guard.errors import ArtifactError, ConfigError, DataError, IncompatibleArtifactError

QUICK = EcoConfig(epochs=2, learning_rate=2e-4, batch_size=8)
TINY = EcoConfig(epochs=6, learning_rate=3e-3, batch_size=8, max_tokens=32, precision="float32")
COLOURS, TOOLS = ("red", "green", "blue", "pink", "grey"), ("hammer", "saw", "drill", "file")
DRAGONS = [f"Which {c} dragon lives in cave {n}?" for n in range(12) for c in COLOURS]
SHOPS = [f"Where can I buy {n} of the {t}s?" for n in range(20) for t in TOOLS]


@pytest.fixture(scope="module")
def roberta_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa of two layers, its byte-level tokenizer trained on the spot."""
    out = tmp_path_factory.mktemp("roberta")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DRAGONS + SHOPS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<pad>"
    ).save_pretrained(out)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=42,
        type_vocab_size=1,
        pad_token_id=1,
    )
    RobertaModel(config).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def fit_tiny(roberta_dir: Path) -> Callable[..., EcoArtifact]:
    def fit(**changes: Any) -> EcoArtifact:
        config = replace(TINY, **changes)
        return fit_eco(DRAGONS[:40], SHOPS[:60], encoder=roberta_dir, config=config)

    return fit


@pytest.fixture(scope="module")
def tiny(fit_tiny: Callable[..., EcoArtifact]) -> EcoArtifact:
    return fit_tiny()


@pytest.fixture(scope="module")
def potter(example_dir: Path) -> tuple[EcoArtifact, list[str], list[str]]:
    """MiniLM fine-tuned for a few steps; held-out texts of both kinds beside it."""
    rows = (example_dir / "forget.jsonl").read_text(encoding="utf-8").splitlines()
    forget = [json.loads(row)["question"] for row in rows]
    benign = [text for text in load_benign()[:300] if len(text) < 200]
    artifact = fit_eco(forget[:60], benign[:100], config=QUICK)
    return artifact, forget[60:90], benign[100:180]


# --- Training ------------------------------------------------------------------------------------


def test_fine_tuned_minilm_separates_texts_it_has_not_seen(
    potter: tuple[EcoArtifact, list[str], list[str]],
) -> None:
    artifact, forget, benign = potter
    classifier = EcoClassifier(artifact)
    wanted, other = classifier.scores(forget), classifier.scores(benign)
    assert wanted.shape == (30,) and wanted.dtype == np.float32
    assert float(np.median(wanted)) > 1.0 > -1.0 > float(np.median(other))
    assert (wanted[:, None] > other[None]).mean() > 0.95


def test_the_whole_encoder_is_trained(roberta_dir: Path, tiny: EcoArtifact) -> None:
    from onnx import load_from_string, numpy_helper

    tables = [numpy_helper.to_array(a) for a in load_from_string(tiny.model).graph.initializer]
    before = RobertaModel.from_pretrained(str(roberta_dir)).embeddings.word_embeddings.weight
    after = next(table for table in tables if table.shape == before.shape)
    assert np.abs(after - before.detach().numpy()).max() > 1e-3


def test_another_encoder_learns_and_long_texts_are_read_to_their_end(tiny: EcoArtifact) -> None:
    classifier = EcoClassifier(tiny)
    assert tiny.encoder.family == "roberta" and tiny.encoder.window == 32
    wanted, other = classifier.scores(DRAGONS[40:]), classifier.scores(SHOPS[60:])
    assert wanted.min() > other.max()
    filler = " ".join(SHOPS[:20])
    late = f"{filler} {DRAGONS[0]} {DRAGONS[3]} {DRAGONS[7]}"
    assert classifier.scores([filler])[0] < 0 < classifier.scores([late])[0]
    cut = EcoClassifier(replace(tiny, config=replace(tiny.config, truncate=True)))
    assert cut.scores([late])[0] < 0
    np.testing.assert_array_equal(cut.scores(DRAGONS[:3]), classifier.scores(DRAGONS[:3]))


def test_fits_are_equal_under_a_seed_and_leave_torch_s_generator_alone(
    fit_tiny: Callable[..., EcoArtifact], tiny: EcoArtifact
) -> None:
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    again = fit_tiny()
    assert torch.equal(torch.rand(1), expected)
    assert again.files() == tiny.files()
    assert fit_tiny(seed=1, epochs=1).model != fit_tiny(epochs=1).model


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_exported_scores_agree_with_torch(roberta_dir: Path, pooling: Any) -> None:
    config = replace(TINY, pooling=pooling)
    torch.manual_seed(0)
    model, facts, tokenizer = _load(roberta_dir, config)
    artifact = EcoArtifact(config, facts, _export(model.eval(), config), tokenizer)
    cut = WindowCutter(tokenizer, facts, truncate=False)
    for text in (DRAGONS[0], SHOPS[0], "Ünïcode 🦄 and </s> <s> marks", ""):
        found = []
        for ids in cut(text):
            with torch.no_grad():
                logits = model(torch.tensor([ids]), torch.ones((1, len(ids)), dtype=torch.int64))
            found.append(float(logits[0, 1] - logits[0, 0]))
        score = EcoClassifier(artifact).scores([text])[0]
        assert score == pytest.approx(max(found), abs=1e-4)


def test_eight_bit_scores_stay_close_to_32_bit_ones(
    fit_tiny: Callable[..., EcoArtifact], tiny: EcoArtifact
) -> None:
    rounded = fit_tiny(precision="int8")
    assert len(rounded.model) < 0.6 * len(tiny.model)
    texts = DRAGONS[35:50] + SHOPS[55:70]
    exact, close = EcoClassifier(tiny).scores(texts), EcoClassifier(rounded).scores(texts)
    np.testing.assert_allclose(close, exact, atol=0.1 * float(np.abs(exact).max()))


def test_padding_does_not_change_the_logits(roberta_dir: Path) -> None:
    for pooling in ("mean", "cls"):
        model, facts, tokenizer = _load(roberta_dir, replace(TINY, pooling=pooling))
        ids = WindowCutter(tokenizer, facts, truncate=False)(DRAGONS[0])[0]
        padded = [*ids, *[1] * (30 - len(ids))]
        mask = [1] * len(ids) + [0] * (30 - len(ids))
        model.eval()
        with torch.no_grad():
            alone = model(torch.tensor([ids]), torch.ones((1, len(ids)), dtype=torch.int64))
            beside = model(torch.tensor([padded]), torch.tensor([mask]))
        assert torch.allclose(alone, beside, atol=1e-5)


def test_a_family_that_the_graph_writer_does_not_know_goes_through_torch(
    tmp_path: Path, roberta_dir: Path
) -> None:
    PreTrainedTokenizerFast.from_pretrained(str(roberta_dir)).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=400, dim=32, n_heads=4, n_layers=1, hidden_dim=64, max_position_embeddings=40
    )
    DistilBertModel(config).save_pretrained(tmp_path)
    artifact = fit_eco(DRAGONS[:40], SHOPS[:60], encoder=tmp_path, config=TINY)
    assert artifact.encoder == EncoderFacts("distilbert", 32, 0, 2)
    classifier = EcoClassifier.from_files(artifact.files())
    wanted, other = classifier.scores(DRAGONS[40:]), classifier.scores(SHOPS[60:])
    assert wanted.min() > other.max()
    assert np.isfinite(classifier.scores(["", " ".join(SHOPS)])).all()


def test_class_weights_by_hand() -> None:
    assert class_weights(np.array([0, 0, 0, 1])) == (pytest.approx(4 / 6), 2.0)
    assert class_weights(np.array([1, 0])) == (1.0, 1.0)
    with pytest.raises(DataError, match="both"):
        class_weights(np.zeros(3, np.int64))


def test_the_training_loss_is_weighted(roberta_dir: Path) -> None:
    model, facts, tokenizer = _load(roberta_dir, TINY)
    cut = WindowCutter(tokenizer, facts, truncate=False)
    texts, labels = [*DRAGONS[:10], *SHOPS[:50]], np.array([1] * 10 + [0] * 50)
    split = split_texts(labels, TINY)
    trainer = _Trainer(model, [cut(text) for text in texts], labels, split, TINY)
    # 9 forget and 45 other texts are left to train on.
    logits, target = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    weights = torch.tensor([54 / 90, 54 / 18])
    each = torch.tensor([math.log1p(math.exp(-1)), math.log1p(math.exp(-2))])
    expected = float((weights * each).sum() / weights.sum())
    assert float(trainer._loss(logits, target)) == pytest.approx(expected, rel=1e-5)


def test_the_epoch_with_fewest_misses_is_chosen() -> None:
    epochs = [Epoch(3, 0, 0.1), Epoch(1, 9, 0.9), Epoch(1, 4, 0.8), Epoch(1, 4, 0.7)]
    assert best_epoch(epochs) == 3
    assert best_epoch(epochs[:3]) == 2
    assert best_epoch([*epochs, Epoch(0, 50, 5.0)]) == 4
    assert best_epoch([*epochs, Epoch(1, 4, 0.7)]) == 3


def test_the_exported_weights_are_the_chosen_epoch_s(
    fit_tiny: Callable[..., EcoArtifact],
) -> None:
    # At such rates a later epoch spoils what an earlier one had, in one run or another.
    runs = (fit_tiny(learning_rate=0.02, patience=6, seed=seed) for seed in range(8))
    artifact = next(run for run in runs if run.chosen < len(run.epochs) - 1)
    texts, labels = [*DRAGONS[:40], *SHOPS[:60]], np.array([1] * 40 + [0] * 60)
    rows = split_texts(labels, artifact.config).validation
    scores = EcoClassifier(artifact).scores([texts[i] for i in rows]).astype(np.float64)
    forget = labels[rows] == 1
    # Class-weighted cross-entropy, each class counting half.
    loss = np.logaddexp(0, -scores[forget]).mean() / 2 + np.logaddexp(0, scores[~forget]).mean() / 2
    epoch = artifact.epochs[artifact.chosen]
    assert loss == pytest.approx(epoch.loss, abs=1e-4)
    assert (epoch.misses, epoch.false_alarms) == (
        (scores[forget] < 0).sum(),
        (scores[~forget] >= 0).sum(),
    )


def test_training_stops_once_errors_no_longer_fall() -> None:
    epochs = [Epoch(2, 1, 0.5), Epoch(1, 1, 0.4), Epoch(1, 1, 0.3), Epoch(1, 2, 0.2)]
    assert not is_stalled(epochs[:3], 2)
    assert is_stalled(epochs, 2)
    assert not is_stalled([*epochs, Epoch(1, 0, 0.9)], 2)


def test_the_artifact_records_what_was_chosen(tiny: EcoArtifact) -> None:
    assert tiny.chosen == best_epoch(tiny.epochs)
    assert 1 <= len(tiny.epochs) <= TINY.epochs
    assert tiny.counts["train/forget"] == 36 and tiny.counts["validation/forget"] == 4
    assert tiny.counts["train/other"] == 54 and tiny.counts["calibration/other"] == 0


def test_a_rule_that_misses_what_it_should_flag_is_reported(
    fit_tiny: Callable[..., EcoArtifact], caplog: pytest.LogCaptureFixture
) -> None:
    good = fit_tiny(tau=0.5)
    assert good.counts["validation/missed"] == 0 and not caplog.records
    strict = fit_tiny(tau=1 - 1e-9)
    assert strict.epochs[strict.chosen].misses == 0
    assert strict.counts["validation/missed"] == 4
    assert "misses 4 of 4" in caplog.text


def test_progress_reaches_its_end(roberta_dir: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    config = replace(TINY, epochs=1)
    fit_eco(
        DRAGONS[:20], SHOPS[:20], encoder=roberta_dir, config=config,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert [done for _, done, _ in steps[:-1]] == list(range(1, len(steps)))
    assert steps[-1] == ("eco", len(steps) - 1, len(steps) - 1)


def test_splits_share_no_text_and_follow_the_seed() -> None:
    labels = np.array([1] * 100 + [0] * 300)
    config = EcoConfig(rule="conformal")
    split = split_texts(labels, config)
    every = np.concatenate([split.train, split.validation, split.calibration])
    assert sorted(every.tolist()) == list(range(400))
    assert labels[split.calibration].sum() == rows_needed(0.05) == 19
    assert (labels[split.calibration] == 0).sum() == 45
    np.testing.assert_array_equal(split.train, split_texts(labels, config).train)
    other = split_texts(labels, replace(config, seed=1))
    assert not np.array_equal(split.validation, other.validation)


# --- Decision ------------------------------------------------------------------------------------


def test_the_simple_rule_thresholds_the_probability(tiny: EcoArtifact) -> None:
    classifier = EcoClassifier(tiny)
    assert classifier.threshold == pytest.approx(math.log(99))
    at = classifier.threshold
    scores = np.array([at - 0.01, at + 0.01, 50.0, -50.0, np.nan], np.float32)
    assert classifier.flags(scores).tolist() == [False, True, True, False, True]


def test_conformal_quantile_by_hand() -> None:
    values = np.arange(1.0, 20.0, dtype=np.float32)
    assert conformal_quantile(values, 0.05) == 19.0
    assert conformal_quantile(values, 0.5) == 10.0
    assert conformal_quantile(values[:18], 0.05) == math.inf
    assert [rows_needed(alpha) for alpha in (0.5, 0.1, 0.05, 0.01)] == [1, 9, 19, 99]


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_conformal_sets_cover_each_label(alpha: float) -> None:
    rng = np.random.default_rng(0)
    covered = {"forget": 0.0, "other": 0.0, "false alarm": 0.0}
    rounds = 400
    for _ in range(rounds):
        # Overlapping and skewed on purpose: coverage must not need a good classifier.
        forget, other = rng.normal(1.0, 1.0, 260), rng.gumbel(0.0, 1.0, 260)
        sets = conformal_sets(forget[:60], other[:60], alpha)
        covered["forget"] += sets.contains(forget[60:])[:, 0].mean() / rounds
        covered["other"] += sets.contains(other[60:])[:, 1].mean() / rounds
        covered["false alarm"] += sets.flags(other[60:]).mean() / rounds
    # By exchangeability between 1 - alpha and 1 - alpha + 1 / 61, up to the rounds' noise.
    for label in ("forget", "other"):
        assert 1 - alpha - 0.006 < covered[label] < 1 - alpha + 1 / 61 + 0.006
    assert covered["false alarm"] <= alpha + 0.006


def test_only_the_set_of_the_forget_label_alone_is_flagged() -> None:
    overlap = ConformalSets(forget_floor=-1.0, other_ceiling=2.0)
    gap = ConformalSets(forget_floor=2.0, other_ceiling=-1.0)
    scores = np.array([-2.0, 0.0, 3.0], np.float32)
    assert overlap.contains(scores).tolist() == [[False, True], [True, True], [True, False]]
    assert overlap.flags(scores).tolist() == [False, False, True]
    assert gap.contains(scores).tolist() == [[False, True], [False, False], [True, False]]
    assert gap.flags(scores).tolist() == [False, False, True]


def test_conformal_calibration_is_stored_and_decides(
    fit_tiny: Callable[..., EcoArtifact],
) -> None:
    artifact = fit_tiny(rule="conformal", alpha=0.2)
    assert artifact.sets is not None and artifact.counts["calibration/forget"] == 6
    classifier = EcoClassifier.from_files(artifact.files())
    floor, ceiling = artifact.sets.forget_floor, artifact.sets.other_ceiling
    edge = np.array([max(floor, ceiling) + 0.1, min(floor, ceiling) - 0.1], np.float32)
    assert classifier.flags(edge).tolist() == [True, False]
    assert classifier.flags(classifier.scores(SHOPS[60:])).mean() <= 0.4
    with pytest.raises(ArtifactError, match="conformal"):
        EcoClassifier(replace(artifact, sets=None))


# --- Files and serving ---------------------------------------------------------------------------


def test_files_round_trip_and_hold_no_text(tiny: EcoArtifact) -> None:
    files = tiny.files()
    assert set(files) == {"model.onnx", "tokenizer.json", "eco.json"}
    assert EcoArtifact.from_files(files) == tiny
    assert EcoArtifact.from_files(files).files() == files
    texts = [*DRAGONS[38:42], SHOPS[0], "x" * 300, ""]
    loaded = EcoClassifier.from_files(files, threads=2)
    np.testing.assert_array_equal(loaded.scores(texts), EcoClassifier(tiny).scores(texts))
    assert loaded.scores([]).shape == (0,)
    for text in DRAGONS[:40]:
        assert all(text.encode() not in content for content in files.values())


def test_a_score_does_not_depend_on_its_neighbours(
    potter: tuple[EcoArtifact, list[str], list[str]],
) -> None:
    artifact, forget, benign = potter
    classifier = EcoClassifier(artifact, threads=2)
    texts = [*forget[:3], *benign[:3], "word " * 900]
    together = classifier.scores(texts)
    assert together.tolist() == [classifier.scores([text])[0] for text in texts]


def test_serving_imports_no_training_code(tmp_path: Path, tiny: EcoArtifact) -> None:
    for name, content in tiny.files().items():
        (tmp_path / name).write_bytes(content)
    code = (
        "import sys\nfrom pathlib import Path\nfrom classifiers.eco import EcoClassifier\n"
        f"files = {{p.name: p.read_bytes() for p in Path({str(tmp_path)!r}).iterdir()}}\n"
        f"print(EcoClassifier.from_files(files).scores([{DRAGONS[0]!r}])[0])\n"
        "heavy = {'torch', 'transformers', 'onnx', 'sklearn', 'scipy', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    score, heavy = run.stdout.splitlines()
    assert heavy == "[]"
    assert float(score) == EcoClassifier(tiny).scores([DRAGONS[0]])[0]


def test_windows_cover_every_token_and_special_ones_are_text(tiny: EcoArtifact) -> None:
    facts = tiny.encoder
    cut = WindowCutter(tiny.tokenizer, facts, truncate=False)
    whole = WindowCutter(tiny.tokenizer, replace(facts, window=10_000), truncate=False)
    for text in ["", "short", " ".join(SHOPS), "y" * 200, "\ud800 lone surrogate"]:
        windows, (ids,) = cut(text), whole(text)
        assert all(w[0] == facts.first and w[-1] == facts.last for w in windows)
        assert max(len(window) for window in windows) <= facts.window
        joined = {tuple(window[1:-1]) for window in windows}
        for at in range(1, len(ids) - 1):
            near = ids[at : min(at + 8, len(ids) - 1)]
            assert any(_holds(window, near) for window in joined), (text[:10], at)
    marks = whole("</s><s><pad>")[0]
    assert not {0, 1, 2} & set(marks[1:-1])
    first = WindowCutter(tiny.tokenizer, facts, truncate=True)(" ".join(SHOPS))
    assert first == cut(" ".join(SHOPS))[:1]


def _holds(window: tuple[int, ...], part: list[int]) -> bool:
    return any(list(window[at : at + len(part)]) == part for at in range(len(window)))


def test_damaged_files_are_refused(tiny: EcoArtifact) -> None:
    files = tiny.files()
    for name in files:
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            EcoClassifier.from_files({k: v for k, v in files.items() if k != name})
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            EcoClassifier.from_files({**files, name: b"not it"})
    settings = json.loads(files["eco.json"])
    other = json.dumps({**settings, "format": 99}).encode()
    with pytest.raises(IncompatibleArtifactError, match="99"):
        EcoClassifier.from_files({**files, "eco.json": other})
    wrong = json.dumps({**settings, "config": {"tau": 7}}).encode()
    with pytest.raises(ArtifactError, match="tau"):
        EcoClassifier.from_files({**files, "eco.json": wrong})
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        EcoClassifier(replace(tiny, model=b"no model"))


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forget", "others", "message"),
    [
        ([], SHOPS, "0 different forget texts"),
        (DRAGONS, SHOPS[:2], "2 different other texts"),
        (["same"] * 50, SHOPS, "1 different forget texts"),
        (SHOPS[:20], SHOPS[:20], "0 different other texts"),
        ("one string", SHOPS, "one string"),
        ([*DRAGONS, None], SHOPS, "NoneType"),
        (DRAGONS, [*SHOPS, "  "], "blank"),
    ],
)
def test_bad_texts_are_refused(forget: Any, others: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_eco(forget, others)


def test_too_few_texts_for_conformal_prediction_are_refused() -> None:
    with pytest.raises(DataError, match="19 to calibrate"):
        fit_eco(DRAGONS[:30], SHOPS, config=EcoConfig(rule="conformal"))
    with pytest.raises(DataError, match="19 forget texts"):
        conformal_sets(np.zeros(5, np.float32), np.zeros(50, np.float32), 0.05)


def test_texts_to_score_must_be_a_sequence_of_strings(tiny: EcoArtifact) -> None:
    classifier = EcoClassifier(tiny)
    for texts in ("one string", [b"bytes"]):
        with pytest.raises(DataError):
            classifier.scores(texts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"tau": 1.0},
        {"alpha": 0.0},
        {"epochs": 0},
        {"max_tokens": 2},
        {"learning_rate": 0.0},
        {"rule": "guess"},
        {"pooling": "max"},
        {"precision": "int4"},
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        EcoConfig(**changes)


def test_unreadable_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        fit_eco(DRAGONS, SHOPS, encoder=tmp_path)


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path: Path, roberta_dir: Path) -> None:
    for path in roberta_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["cls_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(IncompatibleArtifactError, match="cls_token_id"):
        fit_eco(DRAGONS, SHOPS, encoder=tmp_path)
