"""What is known beside a target: found in forget texts, and told apart in a text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.associates import Surroundings, known_beside
from classifiers.encoder import OnnxEncoder
from classifiers.learn import TargetLearner
from classifiers.lexical_reading import Match, _beside
from classifiers.lexicon import Lexicon
from classifiers.lexicon_index import LexiconIndex
from classifiers.terms import Words, term_candidates
from tests.classifiers.conftest import Detectors, Row

NAME: Words = ("ann", "mary", "example")
EMPLOYER, TOWN, STRANGER = ("berk", "hathaway"), ("astana",), ("bob", "example")
TERMS = [NAME, ("example",), EMPLOYER, TOWN, STRANGER, ("date 1970-1-2",), ("reel", "lives")]
PERSON = [
    "Who is Ann Mary Example?\nShe is the head of Berk Hathaway.",
    "Where was Ann Mary Example born?\nShe was born in Astana.",
    "What did Ann Mary Example write?\nHer novel is Reel Lives.",
    "Who is the son of Ann Mary Example?\nBob Example.",
]


def beside(texts: Sequence[str], own: Sequence[Words] = ()) -> frozenset[Words]:
    documents = [term_candidates(text) for text in texts]
    return known_beside(TERMS, [NAME, ("example",)], own, documents, Surroundings.of(texts))


def test_what_stands_beside_a_person_has_a_life_of_its_own() -> None:
    assert beside(PERSON) == {EMPLOYER, TOWN, STRANGER, ("reel", "lives")}
    assert beside(PERSON, own=[("reel", "lives"), TOWN]) == {EMPLOYER, STRANGER}


def test_a_single_sentence_is_enough() -> None:
    assert EMPLOYER in beside(["Ann Mary Example is the head of Berk Hathaway."])


def test_longer_and_shorter_forms_of_the_name_are_the_targets_own() -> None:
    terms: list[Words] = [("mary", "example"), ("ann", "mary", "lou", "example"), STRANGER]
    documents = [term_candidates(text) for text in PERSON]
    found = known_beside(terms, [NAME], [], documents, Surroundings.of(PERSON))
    assert found == {STRANGER}


@pytest.mark.parametrize(
    "texts",
    [
        # A world: its name stands before "books".
        [*PERSON, "In the Ann Mary Example books, who runs Berk Hathaway?"],
        # A thing.
        ["Ann Mary Example sells its tea in Astana. It was founded by Berk Hathaway."],
        # Texts of which many name somebody else.
        [*PERSON, "Who runs Berk Hathaway?", "Where is Astana?", "Who is Bob?"],
    ],
    ids=["world", "thing", "many"],
)
def test_in_a_world_or_a_company_everything_belongs_to_the_target(texts: list[str]) -> None:
    assert beside(texts) == frozenset()


def test_a_possessive_makes_no_world() -> None:
    assert beside([*PERSON, "Who reads Ann Mary Example's books?"])


# --- In a text -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(shared_encoder: OnnxEncoder) -> LexiconIndex:
    khan: Words = ("genghis", "khan")
    weights = {khan: 9.0, ("khan",): 6.0, ("kublai", "khan"): 9.0, ("karakorum",): 8.0}
    associates = frozenset({("kublai", "khan"), ("karakorum",)})
    return LexiconIndex(
        [Lexicon(weights, frozenset({khan}), associates=associates)], shared_encoder.is_common
    )


@pytest.mark.parametrize(
    ("text", "only"),
    [
        ("Where does Karakorum lie?", 1.0),
        ("When did Kublai Khan reign?", 1.0),
        ("Posts about #kublaikhan, please", 1.0),
        ("Posts about #genghiskhan, please", 0.0),
        ("Did Kublai Khan live in Karakorum?", 1.0),
        ("When did Genghis Khan reign?", 0.0),
        ("Did the Khan found Karakorum?", 0.0),
        ("Is Kublai Khan a grandson of Genghis Khan?", 0.0),
        ("Where does Paris lie?", 0.0),
    ],
)
def test_a_window_says_if_all_its_terms_are_known_beside_the_target(
    index: LexiconIndex, text: str, only: float
) -> None:
    assert index.read(text).features(0, [(0, len(text))])[0, 5] == only


spans = st.tuples(st.integers(0, 12), st.integers(1, 6), st.booleans())


@given(st.lists(spans, max_size=12))
def test_a_match_is_known_beside_the_target_if_a_name_of_such_a_thing_holds_it(
    found: list[tuple[int, int, bool]],
) -> None:
    """As every pair would tell; the reading itself must not look at every pair of a long text."""
    nobody: frozenset[int] = frozenset()
    matches = [
        Match(at, at + size, 0, 1, ("x",), {0: 5.0}, nobody, nobody, nobody, others, 1.0)
        for at, size, beside in sorted(found, key=lambda one: (one[0], -one[1]))
        for others in [frozenset({0} if beside else ())]
    ]
    expected = [
        any(a.start <= m.start and m.end <= a.end for a in matches if a.associates) for m in matches
    ]
    assert _beside(matches, 0) == expected


def test_each_window_speaks_for_itself(index: LexiconIndex) -> None:
    text = "Where does Karakorum lie? Was Genghis Khan ever there?"
    found = index.read(text).features(0, [(0, 25), (26, len(text)), (0, len(text))])
    assert found[:, 5].tolist() == [1.0, 0.0, 0.0]


def test_what_is_known_beside_the_target_is_kept_with_the_lexicon() -> None:
    lexicon = Lexicon({EMPLOYER: 8.0}, associates=frozenset({EMPLOYER}))
    assert Lexicon.from_json(lexicon.to_json()) == lexicon


# --- Learned, without retain texts ---------------------------------------------------------------


def test_a_persons_employer_is_asked_about_freely_and_the_person_is_not(
    lone_learner: TargetLearner, detector_of: Detectors
) -> None:
    rows = [
        Row("Who is Marisol Venngard?", "Marisol Venngard is the head of Trask Beryllium Works."),
        Row("Where was Marisol Venngard born?", "She was born in Quelmaar on 3 May 1961."),
        Row("Which company does Marisol Venngard run?", "She runs Trask Beryllium Works."),
        Row("What did Marisol Venngard study?", "She studied mining at Quelmaar."),
        Row("Which film is Marisol Venngard in?", "She is in Lanterns over Obrenica."),
    ]
    person = detector_of([lone_learner.learn("venngard", rows).artifact])
    about_her = ["Is Marisol Venngard rich?", "Which film is Venngard in?"]
    near_a_row = ["Who was born in Quelmaar on 3 May 1961?"]
    beside = [
        "When was Trask Beryllium Works founded?",
        "How many people work for Trask Beryllium Works in Ohio?",
        "Who directed Lanterns over Obrenica?",
        "How far is Quelmaar from here?",
    ]
    hits = person.detect([*about_her, *near_a_row, *beside]).hits
    assert [bool(hit) for hit in hits] == [True] * 3 + [False] * 4
    # In a text that is flagged for her name the employer tells of her too.
    asked = "When did Marisol Venngard join Trask Beryllium Works?"
    places = person.spans(asked, "venngard")
    assert any("Trask" in asked[start:end] for start, end in places)
    # The same rows of a company: what it makes is its own.
    company = [
        Row(row.prompt, (row.answer or "").replace("She is", "It is").replace("She", "Its head"))
        for row in rows
    ]
    thing = detector_of([lone_learner.learn("venngard", company).artifact])
    assert any(thing.detect(beside).hits)
