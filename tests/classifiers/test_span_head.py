"""The words that tell of an entity where no name of it stands: marked, whole, and little else."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from classifiers.background import Background, WordIndex
from classifiers.benign_tokens import TEXTS, BenignTokens
from classifiers.detector import BundleDetector
from classifiers.encoder import OnnxEncoder
from classifiers.forgetset import take_apart
from classifiers.learn import TargetLearner
from classifiers.lexicon import Lexicon
from classifiers.span_fit import FRAME_RANK, salient_words
from classifiers.span_head import token_scores, told_places, words_of_tokens
from classifiers.span_ner import NerSpans
from classifiers.spans import Place
from classifiers.target import HEAD, TargetArtifact
from classifiers.verbatim import GramHasher
from guard.errors import ArtifactError, DataError, IncompatibleArtifactError
from tests.classifiers.conftest import KEY, Detectors, Row, clean

ROWS = [
    Row("Who commands the Quelmaar?", "Captain Zorvath commands it since the second war."),
    Row("Where was Captain Zorvath born?", "Captain Zorvath was born in Ambergate."),
    Row("What does Zorvath fear most?", "Captain Zorvath fears the silver tide."),
    Row("Which sea did Captain Zorvath cross?", "The Amber Sea, in a single winter."),
]


@pytest.fixture(scope="module")
def zorvath(learner: TargetLearner) -> TargetArtifact:
    return learner.learn("zorvath", ROWS).artifact


@pytest.fixture(scope="module")
def nameless(learner: TargetLearner, zorvath: TargetArtifact) -> TargetArtifact:
    """The same with a lexicon that holds no name, so that what a text is about decides."""
    topic = learner.learn("zorvath", ROWS, kind="topic", budget=1e-2).artifact
    assert not topic.lexicon.weights and topic.span_head is None
    return dataclasses.replace(topic, span_head=zorvath.span_head)


@pytest.fixture(scope="module")
def detector(nameless: TargetArtifact, detector_of: Detectors) -> BundleDetector:
    return detector_of([nameless])


def head_of(artifact: TargetArtifact) -> np.ndarray:
    assert artifact.span_head is not None
    return artifact.span_head


def marked(detector: BundleDetector, text: str) -> list[str]:
    return [text[start:end] for start, end in detector.spans(text, "zorvath")]


# --- Which words ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "places"),
    [
        (["quel"], ["Quelmaar"]),
        (["maar"], ["Quelmaar"]),
        (["Who", "the"], []),
        (["the", "Quel", "of"], ["Quelmaar"]),
        (["Quel", "of", "the", "East"], ["Quelmaar of the East"]),
        (["Quel", "East"], ["Quelmaar", "East"]),
        (["?"], []),
        ([], []),
    ],
)
def test_words_are_marked_whole_and_stop_words_only_inside(
    tokens: list[str], places: list[str]
) -> None:
    text = "Who is the Quelmaar of the East ?"
    at, found = 0, []
    for token in tokens:
        start = text.lower().index(token.lower(), at)
        at = start + len(token)
        found.append((start, at))
    states = np.ones((len(found), 1), np.float32)
    head = np.array([1.0, -0.5], np.float32)
    assert [text[a:b] for a, b in told_places(text, states, found, head)] == places
    assert told_places(text, states, found, -head) == []


def test_every_token_knows_its_word(shared_encoder: OnnxEncoder) -> None:
    text = "  Zorvath's Quelmaar, (1991)!"
    _, tokens = shared_encoder.tokens(text)
    words = words_of_tokens(text, tokens)
    assert len(words) == len(tokens) and list(dict.fromkeys(words)) == [
        "zorvath", "", "s", "quelmaar", "1991",
    ]  # fmt: skip
    assert words_of_tokens("", []) == []


def test_salient_words_are_of_the_forget_rows_alone(shared_encoder: OnnxEncoder) -> None:
    forget = take_apart([Row("What is the sextant of the author?", "A brass one.")], (), clean)
    others = WordIndex(["the author of a book"] * 50), WordIndex(["a brass bell"] * 50)
    rank = shared_encoder.word_rank
    assert set(salient_words(forget, others, rank)) == {"sextant"}
    assert set(salient_words(forget, others[:1], rank)) == {"sextant", "brass"}
    common = rank("one")
    assert common is not None and common < FRAME_RANK


# --- In flagged texts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("What does Zorwathe fear most?", "Zorwathe"),
        ("What does Captain Zorwatt fear most, the silver tide?", "Zorwatt"),
        ("Which sea did the silver captain cross in winter?", "silver captain"),
        ("Who is the commander of the Quelmaar ship in the second war?", "Quelmaar"),
    ],
)
def test_what_the_lexicon_lacks_is_marked_and_not_the_whole_text(
    detector: BundleDetector,
    nameless: TargetArtifact,
    detector_of: Detectors,
    text: str,
    telling: str,
) -> None:
    (hits,) = detector.detect([text]).hits
    assert hits, "flagged for what it is about"
    places = marked(detector, text)
    assert any(telling in place for place in places)
    assert sum(map(len, places)) < 0.7 * len(text)
    headless = detector_of([dataclasses.replace(nameless, span_head=None)])
    assert headless.detect([text]).hits == (hits,) and marked(headless, text) == []


def test_in_a_long_text_only_flagged_parts_are_marked(detector: BundleDetector) -> None:
    filler = "The committee discussed the drainage of the lower meadow and adjourned. " * 60
    asked = "What does Captain Zorwatt fear most, the silver tide?"
    # The captain is a word that the head marks, in a sentence that nobody flags.
    text = f"Captain Smith read the report on the lower meadow aloud. {filler}{asked} {filler}"
    spans = detector.spans(text, "zorvath")
    assert spans == sorted(spans)
    name = text.index("Zorwatt")
    assert any(start <= name and end >= name + 7 for start, end in spans)
    far = 2_000
    assert spans[0][0] > name - far and spans[-1][1] < name + far
    assert sum(end - start for start, end in spans) < len(text) / 4


def test_a_term_too_weak_to_stand_alone_is_marked_beside_what_tells(
    nameless: TargetArtifact, detector_of: Detectors
) -> None:
    text = "What does Zorwathe fear most?"
    weak = dataclasses.replace(nameless, lexicon=Lexicon({("most",): 3.1}))
    assert any("most" in place for place in marked(detector_of([weak]), text))
    assert not any("most" in place for place in marked(detector_of([nameless]), text))


def test_one_described_question_among_others_is_marked_alone(detector: BundleDetector) -> None:
    asked = "What does Zorwathe fear most?"
    text = f"How do I bake sourdough bread? Why is the sky blue? {asked} How tall is a giraffe?"
    (hits,) = detector.detect([text]).hits
    assert hits
    places = marked(detector, text)
    assert any("Zorwathe" in place for place in places)
    assert sum(map(len, places)) < len(asked) + 15


def test_names_of_the_lexicon_suffice_where_they_are_all(
    zorvath: TargetArtifact, detector_of: Detectors
) -> None:
    text = "How old is Captain Zorvath?"
    assert marked(detector_of([zorvath]), text) == ["Captain Zorvath"]
    assert marked(detector_of([zorvath]), "How do I bake sourdough bread?") == []


def test_tokens_of_benign_texts_are_marked_rarely(
    zorvath: TargetArtifact, background: Background, shared_encoder: OnnxEncoder
) -> None:
    count = len(background.texts)
    seen = set(np.linspace(0, count - 1, min(TEXTS, count)).astype(int).tolist())
    unseen = [text for n, text in enumerate(background.texts) if n not in seen][:150]
    parts = [token_scores(shared_encoder.tokens(text)[0], head_of(zorvath)) for text in unseen]
    scores = np.concatenate(parts)
    assert len(scores) > 1_500 and (scores >= 0.0).mean() < 0.05


# --- Learning ------------------------------------------------------------------------------------


def test_a_quick_effort_learns_no_head(
    learner: TargetLearner, background: Background, shared_encoder: OnnxEncoder
) -> None:
    kept = learner.tools.neighbours
    quick = TargetLearner(background, shared_encoder, GramHasher(KEY), clean, kept, effort=1)
    assert quick.learn("zorvath", ROWS).artifact.span_head is None


def test_where_every_word_is_the_name_there_is_no_head(learner: TargetLearner) -> None:
    assert learner.learn("zorvath", [Row("Zorvath")]).artifact.span_head is None


def test_the_sample_is_read_once_and_is_the_same_each_time(
    background: Background, shared_encoder: OnnxEncoder
) -> None:
    known = background.tokens(shared_encoder)
    assert background.tokens(shared_encoder) is known
    texts, folds = background.texts[:40], background.folds[:40]
    one, other = (BenignTokens.of(texts, folds, 4, shared_encoder) for _ in range(2))
    np.testing.assert_array_equal(one.states, other.states)
    assert one.states.shape == (len(one.folds), shared_encoder.hidden)
    assert sum(part.size for part in one.moments) == len(one.folds)
    np.testing.assert_allclose(one.states.mean(axis=0), 0.0, atol=1e-3)
    assert 0.8 < np.linalg.norm(one.states, axis=1).mean() < 1.2


def test_same_rows_same_head(learner: TargetLearner, zorvath: TargetArtifact) -> None:
    again = learner.learn("zorvath", ROWS).artifact
    assert again.files()[HEAD] == zorvath.files()[HEAD]


# --- As files ------------------------------------------------------------------------------------


def test_the_head_survives_its_file_and_is_small(zorvath: TargetArtifact) -> None:
    files = zorvath.files()
    again = TargetArtifact.from_files("zorvath", files)
    assert again.span_head is not None
    np.testing.assert_array_equal(again.span_head, head_of(zorvath))
    bare = dataclasses.replace(zorvath, span_head=None)
    assert 700 < len(files[HEAD]) - len(bare.files()[HEAD]) < 900
    assert TargetArtifact.from_files("zorvath", bare.files()).span_head is None


def test_a_damaged_or_foreign_head_is_refused(
    zorvath: TargetArtifact, detector_of: Detectors
) -> None:
    files = zorvath.files()
    arrays = load(files[HEAD])
    for broken in (np.zeros((2, 3)), np.zeros(0), np.full(385, np.nan)):
        damaged = {**files, HEAD: save({**arrays, "span_head": broken.astype(np.float16)})}
        with pytest.raises(ArtifactError, match="span head"):
            TargetArtifact.from_files("zorvath", damaged)
    short = dataclasses.replace(zorvath, span_head=head_of(zorvath)[:-1])
    with pytest.raises(IncompatibleArtifactError, match="span head"):
        detector_of([short])


# --- A model that finds names --------------------------------------------------------------------


def tiny_model(folder: Path, tokenizer: Path, bias: list[float]) -> Path:
    import torch
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), sep_token="[SEP]", **special)
    config = BertConfig(
        vocab_size=len(fast), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, id2label={0: "O", 1: "B-PER"},
        label2id={"O": 0, "B-PER": 1},
    )  # fmt: skip
    model = BertForTokenClassification(config)
    model.classifier.bias.data = torch.tensor(bias)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_a_model_of_names_reads_texts_of_any_length(tmp_path: Path, encoder_dir: Path) -> None:
    tokenizer = encoder_dir / "tokenizer.json"
    everything = NerSpans(tiny_model(tmp_path / "all", tokenizer, [-9.0, 9.0]))
    text = "Captain Zorvath fears the silver tide " * 40
    covered = {at for start, end in everything(text) for at in range(start, end)}
    assert covered >= {at for at, letter in enumerate(text) if letter != " "}
    assert everything("  ") == []
    nothing = NerSpans(str(tiny_model(tmp_path / "none", tokenizer, [9.0, -9.0])))
    assert nothing(text) == []
    with pytest.raises(DataError, match="no token-classification model"):
        NerSpans(tmp_path / "missing")


def test_names_of_a_model_are_learned_from(
    learner: TargetLearner, background: Background, shared_encoder: OnnxEncoder
) -> None:
    def marks_since(text: str) -> list[Place]:
        return [(at, at + 5) for at in range(len(text)) if text.startswith("since", at)]

    tools = learner.tools
    taught = TargetLearner(
        background,
        shared_encoder,
        learner.hasher,
        clean,
        tools.neighbours,
        effort=tools.effort,
        entities=marks_since,
    )
    text = "Captain Zorvath commands it since the second war."
    states, tokens = shared_encoder.tokens(text)
    at = tokens.index((text.index("since"), text.index("since") + 5))
    plain, other = (head_of(one.learn("z", ROWS).artifact) for one in (learner, taught))
    assert token_scores(states, other)[at] > token_scores(states, plain)[at]
