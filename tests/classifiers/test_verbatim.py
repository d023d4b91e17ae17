import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifiers.terms import split_words
from classifiers.verbatim import GRAM, GramHasher, HashArray, VerbatimIndex, forget_grams

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
NOTHING = np.zeros(0, np.uint64)
PASSAGE = (
    "The lighthouse at Corrigan Point was built by three sisters, who carried every stone of it "
    "up the cliff in baskets woven from their own hair; nobody has lit the lamp since."
)
OTHER = "A quite different passage about growing tomatoes in small gardens under glass all year."


def folded(text: str) -> list[str]:
    return [word for word, _, _ in split_words(text)]


def frequent(word: str) -> bool:
    return word != "corrigan"


def grams_of(*texts: str, key: bytes = KEY, common: HashArray = NOTHING) -> HashArray:
    return forget_grams([], [], texts, GramHasher(key), set(), frequent, common)


def question_grams(question: str, *known: str) -> HashArray:
    return forget_grams([question], [], [], GramHasher(KEY), known, frequent, NOTHING)


def answer_grams(answer: str) -> HashArray:
    return forget_grams([], [answer], [], GramHasher(KEY), set(), frequent, NOTHING)


def index_of(*passages: str) -> VerbatimIndex:
    return VerbatimIndex([grams_of(passage) for passage in passages], GramHasher(KEY))


def quoted(index: VerbatimIndex, text: str) -> dict[int, list[str]]:
    found = index.quotes(split_words(text))
    return {owner: [text[a:b] for a, b in places] for owner, places in found.items()}


def test_every_eight_words_of_a_passage_are_found_with_their_place() -> None:
    index, words = index_of(OTHER, PASSAGE), split_words(PASSAGE)
    for first in range(len(words) - GRAM + 1):
        quote = PASSAGE[words[first][1] : words[first + GRAM - 1][2]]
        text = f"He said, “{quote}”, and left."
        assert quoted(index, text) == {1: [quote]}


def test_seven_words_are_not_enough() -> None:
    index, words = index_of(PASSAGE), split_words(PASSAGE)
    for first in range(len(words) - GRAM + 2):
        quote = PASSAGE[words[first][1] : words[first + GRAM - 2][2]]
        assert quoted(index, f"He said, {quote} Frankenstein and left us all here.") == {}


def test_case_accents_and_signs_do_not_matter() -> None:
    disguised = "THE   LÍGHTHOUSE -- at Corrigan.Point, was/built; by three..."
    assert list(quoted(index_of(PASSAGE), disguised)) == [0]


def test_a_changed_swapped_or_missing_word_is_no_quotation() -> None:
    index = index_of(PASSAGE)
    words = folded(PASSAGE)[:GRAM]
    assert list(index.quotes(split_words(" ".join(words)))) == [0]
    for at in range(GRAM - 1):
        swapped = [*words[:at], words[at + 1], words[at], *words[at + 2 :]]
        changed = [*words[:at], "zebra", *words[at + 1 :]]
        for other in (swapped, changed, [*words[:at], *words[at + 1 :], "zebra"]):
            assert index.quotes(split_words(" ".join(other))) == {}, other


def test_another_key_finds_nothing() -> None:
    text = f"Well: {PASSAGE}"
    grams = grams_of(PASSAGE)
    assert VerbatimIndex([grams], GramHasher(KEY)).quotes(split_words(text))
    assert VerbatimIndex([grams], GramHasher(OTHER_KEY)).quotes(split_words(text)) == {}
    assert not np.isin(grams, grams_of(PASSAGE, key=OTHER_KEY)).any()


def test_who_shares_a_passage_is_quoted_with_it() -> None:
    index = index_of(PASSAGE, OTHER, f"{OTHER} {PASSAGE}")
    assert set(quoted(index, PASSAGE)) == {0, 2}
    assert set(quoted(index, f"{OTHER} {PASSAGE}")) == {0, 1, 2}


def test_hashes_are_sorted_distinct_and_the_same_from_any_hasher() -> None:
    grams = grams_of(PASSAGE, PASSAGE, OTHER)
    assert grams.dtype == np.uint64 and (np.diff(grams.astype(object)) > 0).all()
    assert grams.tolist() == grams_of(OTHER, PASSAGE).tolist()
    words = len(folded(PASSAGE)) + len(folded(OTHER))
    assert len(grams) == words - 2 * (GRAM - 1)


def test_common_grams_recognise_nothing() -> None:
    common = GramHasher(KEY).grams(folded(f"As one says: {OTHER}"))
    grams = grams_of(PASSAGE, OTHER, common=common)
    assert grams.tolist() == grams_of(PASSAGE).tolist()
    assert quoted(VerbatimIndex([grams], GramHasher(KEY)), OTHER) == {}


FRAME = "could you please tell me in which year and in what place"


def test_of_a_question_only_grams_with_a_term_are_kept() -> None:
    question = f"{FRAME} Corrigan was born?"
    index = VerbatimIndex([question_grams(question, "corrigan")], GramHasher(KEY))
    assert quoted(index, f"{FRAME} the queen was born?") == {}
    assert quoted(index, "and in what place Corrigan was born?") == {}, "seven words"
    assert list(quoted(index, "year and in what place Corrigan was born?")) == [0]
    assert not len(question_grams(question)), "no term is known"


def test_of_an_answer_grams_of_nothing_but_frequent_words_are_dropped() -> None:
    answer = f"{FRAME} Corrigan was born is not a thing that one can say for sure"
    index = VerbatimIndex([answer_grams(answer)], GramHasher(KEY))
    assert quoted(index, FRAME) == {}
    assert quoted(index, "was born is not a thing that one can say for sure") == {}
    assert list(quoted(index, "Corrigan was born is not a thing that")) == [0]
    assert set(answer_grams(answer).tolist()) < set(grams_of(answer).tolist())


def test_questions_answers_and_texts_are_joined() -> None:
    hasher = GramHasher(KEY)
    question, answer = f"{FRAME} Corrigan was born?", f"Corrigan, {FRAME}"
    both = forget_grams([question], [answer], [PASSAGE], hasher, {"corrigan"}, frequent, NOTHING)
    parts = (question_grams(question, "corrigan"), answer_grams(answer), grams_of(PASSAGE))
    assert both.tolist() == np.unique(np.concatenate(parts)).tolist()


@pytest.mark.parametrize("text", ["", "one two three", "one two three four five six seven"])
def test_short_texts_have_no_grams(text: str) -> None:
    assert len(grams_of(text)) == 0
    assert len(question_grams(text, "one")) == len(answer_grams(text)) == 0
    assert index_of(PASSAGE).quotes(split_words(text)) == {}


def test_an_empty_index_recognises_nothing() -> None:
    for index in (VerbatimIndex([], GramHasher(KEY)), VerbatimIndex([NOTHING], GramHasher(KEY))):
        assert index.quotes(split_words(PASSAGE)) == {}


def test_hashes_tell_texts_apart() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in rng.integers(0, 50, 20_000)]
    hasher = GramHasher(KEY)
    expected = {tuple(words[n : n + GRAM]) for n in range(len(words) - GRAM + 1)}
    assert len(np.unique(hasher.grams(words))) == len(expected)


word = st.text("abcdeéß漢字0", min_size=1, max_size=6)


@settings(max_examples=60)
@given(st.data(), st.lists(word, min_size=GRAM, max_size=25), st.lists(word), st.lists(word))
def test_every_gram_of_a_text_is_recognised_in_any_surroundings(
    data: st.DataObject, passage: list[str], before: list[str], after: list[str]
) -> None:
    text = " ".join(passage)
    words = split_words(text)
    index = index_of(text)
    first = data.draw(st.integers(0, len(words) - GRAM))
    quote = text[words[first][1] : words[first + GRAM - 1][2]]
    found = quoted(index, " ".join([*before, quote, *after]))
    assert quote in found[0]


@given(st.lists(word, max_size=20))
def test_all_that_is_recognised_is_in_the_passage(words: list[str]) -> None:
    passage = "ab ba " * 6
    found = quoted(index_of(passage), " ".join(words))
    for quote in found.get(0, []):
        assert " ".join(folded(quote)) in passage
