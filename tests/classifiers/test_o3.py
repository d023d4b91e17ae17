import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from classifiers.encoder import OnnxEncoder
from classifiers.export import export_encoder, find_encoder_source
from classifiers.o3 import (
    ENCODER_FILES,
    HEAD_FILE,
    REFERENCE_FILE,
    SECRET_FILES,
    O3Artifact,
    O3Config,
    O3Detector,
    layer_states,
    load_encoder,
)
from classifiers.o3_scores import ScoreVariant
from classifiers.o3_train import (
    Batch,
    O3Trainer,
    contrastive_entropy,
    fit_head,
    fit_o3,
    mask_tokens,
    pool,
    split_texts,
    train_o3_encoder,
)
from guard.errors import ArtifactError, ConfigError, DataError, IncompatibleArtifactError

TINY = O3Config(steps=2, head_steps=2, batch=8)
GENERAL = [f"The {word} stood by the river all day." for word in "mill heron bridge barge".split()]
LONG = "The lighthouse keeper counted ships all night. " * 60


def quiet(step: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def forget(example_dir: Path) -> list[str]:
    lines = (example_dir / "forget.jsonl").read_text(encoding="utf-8").splitlines()
    return [str(json.loads(line)["question"]) for line in lines][:60]


@pytest.fixture(scope="module")
def artifact(forget: list[str]) -> O3Artifact:
    return fit_o3(forget, general=GENERAL, config=TINY)


@pytest.fixture(scope="module")
def detector(artifact: O3Artifact) -> O3Detector:
    return O3Detector.from_files(artifact.files())


@pytest.fixture(scope="module")
def trainer() -> O3Trainer:
    return O3Trainer(find_encoder_source(), TINY, quiet)


# --- Training ------------------------------------------------------------------------------------


def test_the_entropy_equals_a_hand_computed_value() -> None:
    # Similarities by hand: layer 1 [[ln 3, 0], [0, 0]], layer 2 all 0.
    ln3 = float(np.log(3.0))
    views = [torch.tensor([[ln3, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)]
    keys = [torch.eye(2), torch.eye(2)]
    sharp = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    wanted = (sharp + np.log(2.0)) / 2 + np.log(2.0)
    assert float(contrastive_entropy(views, keys)) == pytest.approx(wanted, rel=1e-6)


def test_padding_never_counts(trainer: O3Trainer) -> None:
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [6.0]]])
    attend = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(states, attend).tolist() == [[2.0], [4.0]]
    short, long = "Who is it?", "Who is the wizard that lives in the cupboard under the stairs?"
    alone, beside = trainer.batch([short]), trainer.batch([short, long])
    with torch.no_grad():
        wanted = pool(trainer.states(trainer.key, alone)[-1], alone.attend)[0]
        found = pool(trainer.states(trainer.key, beside)[-1], beside.attend)[0]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_masking_hides_words_only_and_at_least_one_a_text() -> None:
    random = torch.Generator().manual_seed(0)
    ids = torch.arange(1000, 1400).reshape(4, 100)
    words = torch.ones_like(ids, dtype=torch.bool)
    words[:, 0] = False
    words[0, 2:] = False
    hidden, labels = mask_tokens(ids, words, 0.15, 103, 30_000, random)
    chosen = labels != -100
    assert not chosen[~words].any() and (labels[chosen] == ids[chosen]).all()
    assert (hidden[~chosen] == ids[~chosen]).all()
    assert chosen.any(dim=1).all() and chosen[0].sum() == 1
    assert 0.08 < float(chosen[1:].float().mean()) < 0.22
    assert float((hidden[chosen] == 103).float().mean()) > 0.6


@pytest.mark.parametrize("key_encoder", ["frozen", "momentum"])
def test_both_losses_fall(forget: list[str], key_encoder: Literal["frozen", "momentum"]) -> None:
    config = replace(
        TINY,
        steps=6,
        head_steps=4,
        learning_rate=3e-3,
        key_encoder=key_encoder,
    )
    trained = train_o3_encoder(forget[:8], config=config, general=GENERAL)
    assert np.mean(trained.entropy[-2:]) < 0.8 * np.mean(trained.entropy[:2])
    assert np.mean(trained.language[-2:]) < np.mean(trained.language[:2])


def test_the_language_head_learns_and_then_rests() -> None:
    texts = [f"{text} It was {n} years old." for n, text in enumerate(GENERAL * 4)]
    learner = O3Trainer(find_encoder_source(), replace(TINY, head_steps=15), quiet)
    losses = learner.fit_language_head(texts)
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    before = {name: value.clone() for name, value in learner.head.state_dict().items()}
    learner.train(texts)
    for name, value in learner.head.state_dict().items():
        assert torch.equal(value, before[name])


def test_without_its_loss_the_language_head_is_not_fitted(forget: list[str]) -> None:
    seen: list[str] = []
    config = replace(TINY, mlm_weight=0.0)
    trained = train_o3_encoder(
        forget[:8], config=config, general=[], progress=lambda what, done, n: seen.append(what)
    )
    assert trained.language == () and len(trained.entropy) == 2
    assert seen == ["O3: encoder"] * 2


def test_the_key_encoder_follows_only_with_momentum(forget: list[str]) -> None:
    kinds: tuple[Literal["frozen", "momentum"], ...] = ("frozen", "momentum")
    for kind in kinds:
        config = replace(TINY, key_encoder=kind, mlm_weight=0.0)
        learner = O3Trainer(find_encoder_source(), config, quiet)
        before = {k: v.clone() for k, v in learner.key.named_parameters() if "lora_B" in k}
        learner.train(forget[:8])
        now, trained = (dict(m.named_parameters()) for m in (learner.key, learner.model))
        for name, value in before.items():
            assert not torch.equal(trained[name], value)
            assert torch.equal(now[name], value) == (kind == "frozen")
            if kind == "momentum":
                gap = (trained[name] - now[name]).abs().max()
                assert gap < (trained[name] - value).abs().max()


def test_the_merged_encoder_gives_the_adapters_states(forget: list[str], tmp_path: Path) -> None:
    learner = O3Trainer(find_encoder_source(), replace(TINY, mlm_weight=0.0), quiet)
    learner.train(forget[:8])
    batch: Batch = learner.batch(forget[:4])
    merged = learner.merged()
    from transformers import BertModel

    plain = BertModel.from_pretrained(merged.write(tmp_path), add_pooling_layer=False).eval()
    with torch.no_grad():
        wanted, found = learner.states(learner.model, batch), learner.states(plain, batch)
        base = learner.states(learner.key, batch)
    for ours, theirs in zip(wanted, found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert (wanted[-1] - base[-1]).abs().max() > 1e-3


def test_serving_reads_the_merged_encoder(forget: list[str], tmp_path: Path) -> None:
    learner = O3Trainer(find_encoder_source(), replace(TINY, mlm_weight=0.0, steps=1), quiet)
    learner.train(forget[:8])
    source = learner.merged().write(tmp_path / "source")
    onnx = OnnxEncoder(export_encoder(tmp_path / "onnx", source), threads=1)
    batch = learner.batch([forget[0]])
    with torch.no_grad():
        layers = learner.states(learner.model, batch)
        wanted = torch.stack([pool(layer, batch.attend)[0] for layer in layers[1:]]).numpy()
    found = layer_states(onnx.encode([forget[0]])[0].features, onnx)[0]
    # 8-bit weights and activations in serving.
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


def test_the_same_seed_gives_the_same_encoder(forget: list[str]) -> None:
    config = replace(TINY, steps=1, head_steps=1)
    first = train_o3_encoder(forget, config=config, general=GENERAL)
    torch.rand(1)
    assert train_o3_encoder(forget, config=config, general=GENERAL) == first
    other = train_o3_encoder(forget, config=replace(config, seed=1), general=GENERAL)
    assert other.files != first.files


def test_training_leaves_the_callers_random_numbers_alone(forget: list[str]) -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    train_o3_encoder(forget[:4], config=replace(TINY, steps=1, mlm_weight=0.0))
    assert torch.equal(torch.rand(3), wanted)


# --- Head and fit --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["o3", "o3-code"])
def test_the_head_equals_scikit_learns_decision(variant: ScoreVariant) -> None:
    from sklearn.svm import OneClassSVM

    rng = np.random.default_rng(0)
    scores = rng.normal(-700.0, [[30.0, 5.0, 90.0]], (80, 3))
    head = fit_head(scores, replace(TINY, variant=variant))
    inputs = head.closeness(scores)
    wanted = OneClassSVM(kernel="linear", nu=TINY.nu, tol=1e-6).fit(inputs)
    fresh = rng.normal(-500.0, 200.0, (50, 3))
    found = wanted.decision_function(head.closeness(fresh))
    assert head.decide(fresh) == pytest.approx(found, rel=1e-6, abs=1e-9)
    assert (head.decide(scores) < -1e-3).mean() <= 0.05


@pytest.mark.parametrize("seed", range(5))
def test_a_closer_layer_never_counts_against_a_text(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Heavy tails, and layers that disagree.
    scores = rng.standard_t(2, (40, 6)) * rng.uniform(1, 100, 6) + rng.normal(0, 500, 6)
    assert (fit_head(scores, TINY).weight > 0).all()


def test_the_two_parts_share_no_text(forget: list[str]) -> None:
    used, rest = split_texts([*forget, *forget[:9], "  "], TINY)
    assert sorted([*used, *rest]) == sorted(set(forget))
    assert len(used) == round(0.5 * len(set(forget)))
    assert (used, rest) == split_texts(forget, TINY)
    assert used != split_texts(forget, replace(TINY, seed=1))[0]
    few = split_texts(forget[:8], replace(TINY, train_share=0.01))
    assert [len(part) for part in few] == [3, 5]


def test_too_little_data_and_bad_settings_are_refused(forget: list[str]) -> None:
    with pytest.raises(DataError, match="at least 8"):
        fit_o3(forget[:7], config=TINY)
    with pytest.raises(DataError, match="at least 2"):
        train_o3_encoder(forget[:1], config=replace(TINY, mlm_weight=0.0))
    changes = ({"nu": 0.0}, {"batch": 1}, {"miss_share": 1.0}, {"variant": "x"}, {"steps": -1})
    for change in changes:
        with pytest.raises(ConfigError, match=next(iter(change))):
            replace(TINY, **change)


# --- Serving -------------------------------------------------------------------------------------


def test_forget_questions_are_closer_than_others(
    detector: O3Detector, artifact: O3Artifact, forget: list[str]
) -> None:
    rest = split_texts(forget, TINY)[1]
    others = [*GENERAL, "How do I boil an egg?", "def add(a, b): return a + b", "Prove that 2 > 1."]
    close, far = detector.scores(rest), detector.scores(others)
    assert np.median(close) > far.max()
    assert detector.flags(close).mean() >= 1 - TINY.miss_share - 1 / len(rest)
    assert detector.weights(close).max() == 1.0
    assert (detector.weights(far)[~detector.flags(far)] == 0).all()
    assert artifact.report["held_out"] == len(rest)


def test_a_text_is_as_close_as_its_closest_window(detector: O3Detector, forget: list[str]) -> None:
    hidden = f"{LONG} {forget[0]} {LONG}"
    alone, buried = detector.scores([LONG, hidden])
    assert buried > alone
    windows = [
        hidden[a:b] for a, b in load_encoder(detector.artifact.encoder).encode([hidden])[0].windows
    ]
    assert buried == pytest.approx(float(detector.scores(windows).max()), rel=0.2)


def test_a_score_does_not_depend_on_the_texts_beside_it(
    detector: O3Detector, forget: list[str]
) -> None:
    fresh = O3Detector(detector.artifact)
    together = fresh.scores([*forget[:5], LONG, ""])
    again = O3Detector(detector.artifact)
    assert [float(again.scores([text])[0]) for text in [*forget[:5], LONG, ""]] == together.tolist()


def test_files_give_the_same_detector_back(
    artifact: O3Artifact, detector: O3Detector, forget: list[str]
) -> None:
    files = artifact.files()
    assert set(files) == {HEAD_FILE, REFERENCE_FILE, *ENCODER_FILES.values()}
    assert O3Artifact.from_files(files).files() == files
    assert (O3Detector.from_files(files).scores(forget) == detector.scores(forget)).all()


def test_no_forget_row_is_outside_the_secret_files(
    artifact: O3Artifact, detector: O3Detector, forget: list[str]
) -> None:
    used = split_texts(forget, TINY)[0]
    encoder = load_encoder(artifact.encoder)
    rows = np.stack([layer_states(t.features, encoder)[0] for t in encoder.encode(used)])
    directions = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    stored = artifact.glocal.to_arrays()["0.rows"]
    assert stored == pytest.approx(directions[:, 0], abs=1e-5)
    needles = [row.astype(np.float32).tobytes()[:64] for row in stored]
    for name, data in artifact.files().items():
        assert any(needle in data for needle in needles) == (name in SECRET_FILES)
        assert not any(text.encode() in data for text in used)


def test_all_rows_may_be_kept_once_the_threshold_stands(forget: list[str]) -> None:
    config = replace(TINY, steps=0)
    train = fit_o3(forget, config=config)
    both = fit_o3(forget, config=replace(config, reference="all"))
    assert both.soft_weight == train.soft_weight
    rest = split_texts(forget, config)[1]
    assert (O3Detector(both).scores(rest) > O3Detector(train).scores(rest)).all()


def test_damaged_or_foreign_files_are_refused(artifact: O3Artifact, tmp_path: Path) -> None:
    files = artifact.files()
    settings = json.loads(files[HEAD_FILE])
    for name in files:
        with pytest.raises(ArtifactError, match="lacks"):
            O3Detector.from_files({k: v for k, v in files.items() if k != name})
    for broken in ("{", "[]", json.dumps({**settings, "format": 99})):
        with pytest.raises(ArtifactError):
            O3Detector.from_files({**files, HEAD_FILE: broken.encode()})
    for change in ({"nu": 7.0}, {"nu": "x"}, {"unknown": 1}):
        altered = {**settings, "config": {**settings["config"], **change}}
        with pytest.raises(ArtifactError, match="settings"):
            O3Detector.from_files({**files, HEAD_FILE: json.dumps(altered).encode()})
    short = {**settings, "head": {**settings["head"], "weight": [1.0]}}
    with pytest.raises(ArtifactError, match="fit together"):
        O3Detector.from_files({**files, HEAD_FILE: json.dumps(short).encode()})
    with pytest.raises(ArtifactError):
        O3Detector.from_files({**files, REFERENCE_FILE: b"nothing"})
    plain = export_encoder(tmp_path)
    foreign = {path: (plain / name).read_bytes() for name, path in ENCODER_FILES.items()}
    with pytest.raises(IncompatibleArtifactError, match="another encoder"):
        O3Detector.from_files({**files, **foreign})


def test_serving_imports_no_training_library(artifact: O3Artifact, tmp_path: Path) -> None:
    for name, data in artifact.files().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    code = (
        "import sys; from pathlib import Path; from classifiers.o3 import O3Detector\n"
        f"root = Path({str(tmp_path)!r})\n"
        "names = [p for p in root.rglob('*') if p.is_file()]\n"
        "found = {str(p.relative_to(root)): p.read_bytes() for p in names}\n"
        "assert len(O3Detector.from_files(found).scores(['Who is it?', ''])) == 2\n"
        "bad = {'torch', 'transformers', 'peft', 'sklearn', 'scipy', 'onnx'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
