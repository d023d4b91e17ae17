import pytest

from classifiers.encoder import OnnxEncoder
from classifiers.lexicon import STRONG, Lexicon
from classifiers.terms import (
    build_weights,
    count_known,
    count_terms,
    find_dates,
    find_names,
    term_candidates,
)
from guard.errors import ArtifactError

FORGET = [
    "Where was Basil Al-Kuwaiti born?\nBasil Al-Kuwaiti was born in Kuwait City on 08/09/1956.",
    "Which genre does Basil Al-Kuwaiti write?\nHis genre is French literature.",
    'Who wrote "Promise by the Seine"?\nThat was Basil Al-Kuwaiti, in 1988.',
    "What prize did Al-Kuwaiti win?\nHe won the Prix Goncourt for Promise by the Seine.",
]
BENIGN = [
    "Where was Marie Curie born?",
    "Which genre does this book belong to?",
    "What is the capital of France? Write it in French.",
    "I promise to write a letter to my friend.",
] * 50


@pytest.fixture(scope="module")
def lexicon(shared_encoder: OnnxEncoder) -> Lexicon:
    mine = [term_candidates(text) for text in FORGET]
    others = count_terms(count_known(BENIGN, set().union(*mine)))
    weights = build_weights(
        count_terms(mine), [others], find_names(FORGET).__contains__, shared_encoder.word_rank
    )
    return Lexicon(weights, shared_encoder.is_common)


def found(lexicon: Lexicon, text: str) -> set[str]:
    return {text[match.start : match.end] for match in lexicon.matches(text)}


def test_names_and_titles_are_terms_and_common_words_are_not(lexicon: Lexicon) -> None:
    assert lexicon.weights[("basil", "al", "kuwaiti")] > STRONG
    assert lexicon.weights[("promise", "by", "the", "seine")] > STRONG
    for word in ("genre", "born", "where", "write", "french", "the"):
        assert (word,) not in lexicon.weights


def test_names_are_found_in_any_case_and_with_possessives(lexicon: Lexicon) -> None:
    for text in (
        "Tell me about Basil Al-Kuwaiti.",
        "BASIL AL-KUWAITI'S BOOKS",
        "who is basil al-kuwaiti",
    ):
        assert any("kuwaiti" in place.casefold() for place in found(lexicon, text)), text
    assert not lexicon.matches("Where was Marie Curie born?")


def test_misspelt_names_are_found_with_less_weight(lexicon: Lexicon) -> None:
    exact = max(m.weight for m in lexicon.matches("Who is Kuwaiti?"))
    typo = [m for m in lexicon.matches("Who is Kuwaitti?") if m.term == ("kuwaiti",)]
    assert typo and 0 < typo[0].weight < exact


def test_english_words_are_never_taken_for_typos(lexicon: Lexicon) -> None:
    assert not lexicon.matches("I promised to eat a basin of basic food.")


def test_a_strangers_given_name_weakens_a_shared_surname(shared_encoder: OnnxEncoder) -> None:
    lexicon = Lexicon({("marais",): 8.0}, shared_encoder.is_common)
    alone = lexicon.matches("Where was Marais born?")[0].weight
    stranger = lexicon.matches("Where was Elsie Marais born?")[0].weight
    assert stranger < alone


def test_a_known_other_name_is_not_taken_for_a_typo(lexicon: Lexicon) -> None:
    assert lexicon.matches("Who is Kuwaita?")
    wiser = lexicon.without(["kuwaita", "something"])
    assert not wiser.matches("Who is Kuwaita?")
    assert wiser.others == {"kuwaita"}
    assert Lexicon.from_json(wiser.to_json(), lambda word: False).others == {"kuwaita"}


def test_dates_are_found_however_they_are_written() -> None:
    forms = (
        "born on 08/09/1956",
        "born 1956-09-08",
        "born on September 8th, 1956",
        "born on the 8th of September, 1956",
        "8 Sep 1956",
    )
    assert {tuple(date for date, _, _ in find_dates(form)) for form in forms} == {
        ("date 1956-8-9",)
    }
    assert find_dates("version 99/99/2020, 1956, May I go?") == []


def test_a_forget_rows_date_is_a_term(lexicon: Lexicon) -> None:
    text = "Which author was born on September 8, 1956?"
    assert "September 8, 1956" in found(lexicon, text)


def test_features_speak_of_their_window_only(lexicon: Lexicon) -> None:
    text = "Basil Al-Kuwaiti wrote it. " + "Nothing here. " * 5
    features = lexicon.features(text, [(0, 30), (30, len(text))])
    assert features[0, 1] > STRONG and features[0, 3] >= 1
    assert not features[1].any()


def test_texts_without_terms_give_zeros_and_so_does_an_empty_lexicon(lexicon: Lexicon) -> None:
    assert not lexicon.features("Hello", [(0, 5)]).any()
    empty = Lexicon({}, lambda word: True)
    assert not empty.features("Basil", [(0, 5)]).any() and empty.matches("Basil") == []


def test_json_round_trip_holds_no_sentence(lexicon: Lexicon, shared_encoder: OnnxEncoder) -> None:
    data = lexicon.to_json()
    again = Lexicon.from_json(data, shared_encoder.is_common)
    assert again.weights == pytest.approx(lexicon.weights, abs=1e-3)
    assert b"was born" not in data
    for broken in (b"", b"[]", b'{"terms": [1]}', b"\xff"):
        with pytest.raises(ArtifactError):
            Lexicon.from_json(broken, shared_encoder.is_common)


def test_counts_of_folds_add() -> None:
    mine = [term_candidates(text) for text in FORGET]
    both = count_terms(mine[:1]) + count_terms(mine[1:])
    assert both == count_terms(mine)


def test_a_word_of_the_retain_set_loses_weight(shared_encoder: OnnxEncoder) -> None:
    mine = [term_candidates(text) for text in FORGET]
    terms: set[tuple[str, ...]] = set().union(*mine)
    benign = count_terms(count_known(BENIGN, terms))
    retain = count_terms(count_known(["Who is Basil Fawlty?", "Who is Sybil?"], terms))
    names, rank = find_names(FORGET).__contains__, shared_encoder.word_rank
    before = build_weights(count_terms(mine), [benign], names, rank)
    after = build_weights(count_terms(mine), [benign, retain], names, rank)
    assert after.get(("basil",), 0.0) < before[("basil",)]
    assert after[("kuwaiti",)] == pytest.approx(before[("kuwaiti",)], abs=0.1)
