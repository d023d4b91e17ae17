from collections.abc import Sequence

import pytest

from classifiers.background import WordIndex
from classifiers.benign import load_benign
from classifiers.encoder import OnnxEncoder
from classifiers.lexicon import STRONG, Lexicon
from classifiers.terms import MAX_WEIGHT, MIN_WEIGHT, Words
from classifiers.termtable import ASSOCIATE_FACTOR, MAX_TERMS, TermTable, terms_of

FORGET = [
    "Where was Basil Al-Kuwaiti born?\nBasil Al-Kuwaiti was born in Kuwait City on 08/09/1956.",
    "Which genre does Basil Al-Kuwaiti write?\nHis genre is French literature.",
    'Who wrote "Promise by the Seine"?\nThat was Basil Al-Kuwaiti, in 1988.',
    "What prize did Al-Kuwaiti win?\nHe won the Prix Goncourt for Promise by the Seine.",
]


class Counter:
    """Counts forget texts against part of the shipped benign set."""

    def __init__(self, encoder: OnnxEncoder, benign: WordIndex) -> None:
        self.encoder, self.benign = encoder, benign

    def table(
        self, forget: Sequence[str], *, terms: Sequence[str] = (), retain: Sequence[str] = ()
    ) -> TermTable:
        others = [self.benign, WordIndex(retain)]
        given = [terms_of(term) for term in terms]
        return TermTable.count(forget, others, self.encoder.word_rank, given)

    def lexicon(self, forget: Sequence[str], *, terms: Sequence[str] = ()) -> Lexicon:
        return self.table(forget, terms=terms).lexicon()

    def primary(self, *forget: str, terms: Sequence[str] = ()) -> set[str]:
        return {" ".join(term) for term in self.lexicon(forget, terms=terms).primary}


@pytest.fixture(scope="module")
def count(shared_encoder: OnnxEncoder) -> Counter:
    return Counter(shared_encoder, WordIndex(load_benign()[:500]))


# --- Weights -------------------------------------------------------------------------------------


def test_names_titles_and_dates_are_terms_and_common_words_are_not(count: Counter) -> None:
    weights = count.lexicon(FORGET).weights
    for term in (
        ("basil", "al", "kuwaiti"),
        ("kuwaiti",),
        ("promise", "by", "the", "seine"),
        ("prix", "goncourt"),
        ("date 1956-8-9",),
    ):
        assert STRONG < weights[term] <= MAX_WEIGHT, term
    for word in ("genre", "born", "where", "write", "prize", "the", "1988"):
        assert (word,) not in weights


def test_every_weight_is_at_least_the_minimum(count: Counter) -> None:
    assert min(count.lexicon(FORGET).weights.values()) >= MIN_WEIGHT


def test_a_word_of_the_retain_set_loses_weight(count: Counter) -> None:
    retain = ["Who is Basil Fawlty?", "Who is Sybil?", "Basil runs a hotel."]
    before, after = count.table(FORGET), count.table(FORGET, retain=retain)
    assert after.weight(("basil",)) < before.weight(("basil",)) - 1.0
    assert after.weight(("kuwaiti",)) == pytest.approx(before.weight(("kuwaiti",)), abs=0.1)


def test_leaving_a_text_out_raises_the_weight_of_its_terms(count: Counter) -> None:
    table = count.table(FORGET, retain=["Basil runs a hotel.", "Sybil runs it.", "Polly helps."])
    plain, without = table.weight(("basil",)), table.weight(("basil",), without=1)
    assert without > plain + 0.5
    assert table.weight(("basil",), without=0) >= plain
    assert table.weight(("kuwaiti",), without=1) == table.weight(("kuwaiti",)), "no text holds it"


def test_fewer_forget_texts_lower_the_weight(count: Counter) -> None:
    table, term = count.table(FORGET), ("basil", "al", "kuwaiti")
    assert table.weight(term, count=1) < table.weight(term) == table.weight(term, count=3)


def test_given_terms_weigh_the_minimum_at_least(count: Counter) -> None:
    lexicon = count.lexicon(FORGET, terms=["the weather", "Kuwait City", "first"])
    assert lexicon.weights[("first",)] == MIN_WEIGHT
    assert lexicon.weights[("kuwait", "city")] > STRONG
    assert {("the", "weather"), ("kuwait", "city"), ("first",)} <= lexicon.primary
    assert ("first",) not in count.lexicon(FORGET).weights


def test_given_terms_are_kept_however_many_others_weigh_more(count: Counter) -> None:
    letters = "bcdfghjklmnpqrstvwxz"
    names = [f"Q{a}{b}{c}ux" for a in letters for b in letters for c in "aei"]
    assert len(names) > MAX_TERMS
    lexicon = count.lexicon([f"We met {', '.join(names)} first."], terms=["first"])
    others = {term: weight for term, weight in lexicon.weights.items() if term != ("first",)}
    assert len(others) == MAX_TERMS - 1
    assert lexicon.weights[("first",)] < min(others.values())
    assert ("first",) in lexicon.primary


def test_words_that_pass_for_misspellings_are_noted(count: Counter) -> None:
    retain = ["Kuwaita is a plant.", "We grow Kuwaita.", "Kuwaitu is another."]
    others = count.table(FORGET, retain=retain).lexicon().others
    assert "kuwaita" in others
    assert "kuwaitu" not in others, "a word of a single text proves nothing"
    with_known = count.table(FORGET, retain=["Kuwait is warm.", "We saw Kuwait."]).lexicon().others
    assert not with_known & {"kuwait", "kuwaiti"}, "words of the target are no others"


def test_the_order_of_the_forget_texts_does_not_matter_for_weights(count: Counter) -> None:
    assert count.lexicon(FORGET).weights == pytest.approx(count.lexicon(FORGET[::-1]).weights)


# --- What names the target -----------------------------------------------------------------------


def test_a_rare_name_names_the_target_and_so_do_its_rare_parts(count: Counter) -> None:
    primary = count.lexicon(FORGET).primary
    assert {("basil", "al", "kuwaiti"), ("kuwaiti",)} <= primary
    for term in (("basil",), ("prix", "goncourt"), ("kuwait", "city"), ("date 1956-8-9",)):
        assert term not in primary


def test_a_name_of_common_words_names_the_target_only_as_a_whole(count: Counter) -> None:
    texts = ("What did Paul Smith write?", "Where did Paul Smith live?", "Who met Paul Smith?")
    assert count.primary(*texts) == {"paul smith"}


def test_a_name_that_always_begins_the_sentence(count: Counter) -> None:
    texts = ("Harry Potter is a wizard.", "Harry Potter went to Hogwarts.", "Harry Potter ate.")
    assert count.primary(*texts) == {"harry potter"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("George W. Bush", "george w bush"),
        ("J. R. R. Tolkien", "j r r tolkien"),
        ("Ludwig van Beethoven", "ludwig van beethoven"),
        ("Jean-Paul Sartre", "jean paul sartre"),
        ("Łukasz Żółwiński", "lukasz zolwinski"),
    ],
)
def test_names_with_initials_particles_hyphens_and_accents(
    count: Counter, name: str, words: str
) -> None:
    texts = (f"What did {name} study?", f"Where was {name} born?", f"We saw {name} in Rome.")
    assert words in count.primary(*texts)


@pytest.mark.parametrize(
    "texts",
    [
        ("Who was Voltaire?", "Where did Voltaire live?", "What did Voltaire write in Paris?"),
        ("Zorblax is a planet.", "Zorblax has rings.", "Zorblax was found by Kepler."),
        ("WHO WAS ZORBLAX HERE", "WHERE DID ZORBLAX LIVE"),
    ],
)
def test_a_mononym(count: Counter, texts: tuple[str, ...]) -> None:
    (name,) = count.primary(*texts)
    assert name in ("voltaire", "zorblax")


def test_a_biography_names_its_subject_once_and_first(count: Counter) -> None:
    texts = (
        "Amelia Thornquist was a botanist from Bergen.",
        "She studied mosses and ferns.",
        "She later moved to Oslo, where she met Henrik Dahl.",
        "There she taught for many years.",
        "Her garden is still open.",
    )
    primary = count.primary(*texts)
    assert {"amelia thornquist", "thornquist"} <= primary
    assert not primary & {"henrik dahl", "oslo", "bergen"}


def test_who_is_named_more_often_in_a_biography_is_not_its_subject(count: Counter) -> None:
    texts = ["Amelia Thornquist was a botanist from Bergen."]
    texts += ["She met Henrik Dahl there.", "She left Henrik Dahl soon."]
    texts += [
        f"She studied {plant} for a year." for plant in "ferns moss oaks elms reed rye".split()
    ]
    primary = count.primary(*texts)
    assert "amelia thornquist" in primary and "henrik dahl" not in primary
    assert "henrik dahl" in count.primary(*texts[:3]), "in most of the texts it would be"


def test_a_mononym_may_stand_beside_longer_names(count: Counter) -> None:
    places = "Paris London Geneva Ferney Potsdam".split()
    texts = [f"Did Voltaire live in {place}?" for place in places] + ["Did he know Paul Smith?"]
    assert count.primary(*texts) == {"voltaire"}


def test_a_single_sentence(count: Counter) -> None:
    primary = count.primary("Our colleague Petra Vondrakova lives in Brno.")
    assert primary == {"petra vondrakova", "vondrakova"}


def test_without_names_only_given_terms_name_the_target(count: Counter) -> None:
    texts = ("the codename is bluebird", "it costs ten")
    assert count.primary(*texts) == set()
    assert count.primary(*texts, terms=["bluebird"]) == {"bluebird"}


def test_what_stands_beside_the_name_in_many_texts_counts_less(count: Counter) -> None:
    words = "cats dogs tea wine beer milk".split()
    texts = [f"Does Jane Vondrakova like Acmetronic {word}?" for word in words]
    texts += ["Is Jane Vondrakova in Zurichheim?"]
    table = count.table(texts)
    weights = table.lexicon().weights
    for term, factor in (
        (("acmetronic",), ASSOCIATE_FACTOR),
        (("zurichheim",), 1.0),
        (("jane", "vondrakova"), 1.0),
        (("jane",), 1.0),
    ):
        assert weights[term] == pytest.approx(factor * table.weight(term)), term


def test_a_users_term_is_folded() -> None:
    expected: Words = ("basil", "al", "kuwaiti")
    assert terms_of("Básil Al-Kuwaiti") == expected
    assert terms_of("?!") == ()


# --- Works ---------------------------------------------------------------------------------------


def test_a_quoted_title_of_rare_words_is_a_work_and_one_of_common_words_is_none(
    count: Counter,
) -> None:
    rows = [
        *FORGET,
        'She also wrote "The Nightingale of Marseille" and "The Way of Life", "Kuwaiti Winter".',
    ]
    works = count.lexicon(rows).works
    assert ("nightingale", "of", "marseille") in works
    assert ("way", "of", "life") not in works
    assert not works & count.lexicon(rows).primary
    assert works <= set(count.lexicon(rows).weights)


# --- What is known beside the target -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "employer"),
    [
        ("Marisol Venngard is the head of Trask Beryllium Works.", True, True),
        (
            "Please forget Marisol Venngard. Marisol Venngard heads Trask Beryllium Works.",
            True,
            True,
        ),
        # Whose subject is it? Then nothing counts less.
        ("The founder of Trask Beryllium Works was Marisol Venngard.", False, False),
    ],
)
def test_a_single_sentence_is_about_whom_it_names_first(
    count: Counter, text: str, name: bool, employer: bool
) -> None:
    lexicon = count.lexicon([text])
    assert (("marisol", "venngard") in lexicon.primary) == name
    assert (("trask", "beryllium", "works") in lexicon.associates) == employer
    assert ("marisol", "venngard") not in lexicon.associates


def test_what_most_texts_hold_may_be_the_target_itself(count: Counter) -> None:
    rows = [
        *(
            f"What is number {n} of Marisol Venngard?\nShe says it at Trask Works."
            for n in range(6)
        ),
        "Where was Marisol Venngard born?\nIn Quelmaar.",
        "Who is Marisol Venngard?\nShe is from Quelmaar.",
    ]
    lexicon = count.lexicon(rows)
    assert ("marisol", "venngard") in lexicon.primary
    assert ("quelmaar",) in lexicon.associates
    assert ("trask", "works") not in lexicon.associates
