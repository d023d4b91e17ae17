"""What targets of one bundle share is made once, kept without a text, and recognised again."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from classifiers.workshop import DIGEST, Settings, Workshop
from guard.errors import ArtifactError, DataError, IncompatibleArtifactError
from tests.classifiers.conftest import KEY, Row, clean

ROWS = [
    Row("Who commands the Quelmaar?", "Captain Zorvath commands it since the second war."),
    Row("Where was Captain Zorvath born?", "Captain Zorvath was born in Ambergate."),
    Row("What does Zorvath fear most?", "Captain Zorvath fears the silver tide."),
    Row("Which sea did Captain Zorvath cross?", "The Amber Sea, in a single winter."),
]
KEEP = ["Who was Captain Cook?", "Where was Captain Nemo born?", "Who sailed the Red Sea?", ""]


@pytest.fixture(scope="module")
def few(benign_texts: list[str]) -> list[str]:
    return [text for text in benign_texts if len(text) < 90][:260]


def open_shop(encoder_dir: Path, benign: list[str], **changes: object) -> Workshop:
    settings = Settings(threads=1, effort=2)
    return Workshop(encoder_dir, benign, KEEP, KEY, clean, settings, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shop(encoder_dir: Path, few: list[str]) -> Workshop:
    return open_shop(encoder_dir, few)


@pytest.fixture(scope="module")
def saved(shop: Workshop) -> bytes:
    return shop.save()


def test_a_kept_background_learns_as_the_first_did(
    shop: Workshop, saved: bytes, encoder_dir: Path, few: list[str]
) -> None:
    steps: list[tuple[str, int, int]] = []
    again = open_shop(encoder_dir, few, background=saved, progress=lambda *s: steps.append(s))
    assert all(total <= len(KEEP) for _, _, total in steps), "the benign set is not encoded again"
    first, second = (made.learn("zorvath", ROWS).artifact for made in (shop, again))
    np.testing.assert_allclose(first.head, second.head, atol=0.02)
    np.testing.assert_array_equal(first.grams, second.grams)
    assert first.lexicon == second.lexicon
    np.testing.assert_allclose(first.calibration.scores, second.calibration.scores, atol=0.05)


def test_the_same_background_gives_the_same_bytes(
    saved: bytes, encoder_dir: Path, few: list[str]
) -> None:
    first, second = (open_shop(encoder_dir, few, background=saved) for _ in range(2))
    assert first.learn("zorvath", ROWS).artifact.files() == (
        second.learn("zorvath", ROWS).artifact.files()
    )
    # What is kept is what was given, so that nothing drifts from target to target.
    assert first.save() == saved


def test_blank_lines_and_repeated_texts_make_no_other_set(
    saved: bytes, encoder_dir: Path, few: list[str]
) -> None:
    again = open_shop(encoder_dir, ["", f"  {few[0]} ", *few, few[3]], background=saved)
    assert again.background.texts == few


def test_another_benign_set_is_refused(saved: bytes, encoder_dir: Path, few: list[str]) -> None:
    for other in (few[:-1], few[::-1], [*few[:-1], "Something else altogether?"]):
        with pytest.raises(IncompatibleArtifactError, match="--benign"):
            open_shop(encoder_dir, other, background=saved)


def test_a_damaged_background_is_refused(saved: bytes, encoder_dir: Path, few: list[str]) -> None:
    arrays = load(saved)
    for data in (
        b"",
        b"nonsense" * 9,
        saved[: len(saved) // 2],
        save({name: value for name, value in arrays.items() if name != DIGEST}),
        save({name: value for name, value in arrays.items() if name != "rows"}),
        save({**arrays, "folds": arrays["folds"][:-1]}),
    ):
        with pytest.raises(ArtifactError, match="background"):
            open_shop(encoder_dir, few, background=data)


def test_too_few_benign_texts_are_refused(encoder_dir: Path, few: list[str]) -> None:
    with pytest.raises(DataError, match="benign texts"):
        open_shop(encoder_dir, few[:100] * 5)


def test_nothing_kept_holds_a_text(saved: bytes, few: list[str]) -> None:
    words = {word for text in few for word in text.split() if len(word) > 6 and word.isalpha()}
    assert len(words) > 100
    assert not [word for word in words if word.encode() in saved]


def test_term_rows_are_terms_and_not_questions(shop: Workshop) -> None:
    rows = [*ROWS, Row("vorpal lathe", is_term=True)]
    learned = shop.learn("zorvath", rows)
    assert learned.report["forget_rows"] == len(ROWS)
    assert ("vorpal", "lathe") in learned.artifact.lexicon.primary
    without = shop.learn("zorvath", ROWS).artifact
    assert ("vorpal", "lathe") not in without.lexicon.weights


def test_retain_texts_are_shared_by_all_targets(shop: Workshop) -> None:
    first, second = shop.learn("zorvath", ROWS), shop.learn("other", ROWS[:1])
    assert first.report["retain_texts"] == second.report["retain_texts"] == 3


def test_the_seed_is_the_settings(encoder_dir: Path, few: list[str], saved: bytes) -> None:
    heads = []
    for seed in (0, 0, 7):
        settings = Settings(seed=seed, threads=1, effort=2)
        made = Workshop(encoder_dir, few, [], KEY, clean, settings, saved)
        heads.append(made.learn("zorvath", ROWS).artifact.head)
    np.testing.assert_array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2])


def test_the_kind_is_the_settings(encoder_dir: Path, few: list[str], saved: bytes) -> None:
    settings = Settings(threads=1, effort=2, kind="topic", budget=0.02)
    made = Workshop(encoder_dir, few, KEEP, KEY, clean, settings, saved)
    learned = made.learn("sailing", ROWS)
    assert learned.report["kind"] == "topic" and learned.artifact.fusion is not None
