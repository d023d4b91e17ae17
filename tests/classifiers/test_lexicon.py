import itertools
import json
import math
import string
from collections.abc import Mapping

import numpy as np
import pytest

from classifiers.encoder import OnnxEncoder
from classifiers.lexical_reading import (
    FEATURES,
    FUZZY_FACTOR,
    MAX_OWNERS,
    OTHER_NAME_FACTOR,
    PART_WORTH,
    LexicalReading,
    PreparedText,
    names_anything,
)
from classifiers.lexicon import STRONG, Lexicon
from classifiers.lexicon_index import MIDDLE_NAME_FACTOR, LexiconIndex
from classifiers.terms import Words
from guard.errors import ArtifactError

NAME, PART, GIVEN, PLACE = 9.0, 7.0, 3.5, 8.5
WIZARD = Lexicon(
    {
        ("harry", "potter"): NAME,
        ("potter",): PART,
        ("harry",): GIVEN,
        ("hogwarts",): PLACE,
        ("voldemort",): 8.0,
        ("date 1980-7-31",): 7.5,
    },
    frozenset({("harry", "potter")}),
)
NOVEL = ("city", "that", "crumbled")
NOVELIST = Lexicon(
    {("ann", "example"): 9.0, NOVEL: 8.0, ("crumbled",): 5.0, ("reel", "lives"): 7.0},
    frozenset({("ann", "example")}),
    works=frozenset({NOVEL, ("reel", "lives")}),
)
MONONYM = Lexicon({("voltaire",): 8.0}, frozenset({("voltaire",)}))
PAINTER = Lexicon({("elsie", "marais"): 9.0, ("marais",): 8.0}, frozenset({("elsie", "marais")}))


@pytest.fixture(scope="module")
def index(shared_encoder: OnnxEncoder) -> LexiconIndex:
    words = shared_encoder.common_words()
    return LexiconIndex([WIZARD, MONONYM, PAINTER], shared_encoder.is_common, words)


def weights(index: LexiconIndex, text: str, target: int = 0) -> dict[str, float]:
    """The heaviest weight of each term of a target in a text."""
    found: dict[str, float] = {}
    for match, weight in index.read(text).of(target):
        term = " ".join(match.term)
        found[term] = max(weight, found.get(term, 0.0))
    return found


def whole(index: LexiconIndex, text: str, target: int = 0) -> list[float]:
    features = index.read(text).features(target, [(0, len(text))])
    return [float(number) for number in features[0]]


# --- Exact matches -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Harry Potter", "harry potter", "HARRY POTTER", "Harry Potter's", "Harry\nPotter",
        "Harry-Potter", "¿Harry Potter?", "«Harry Potter»", "Hárry Pótter", "Harrys Potters",
    ],
)  # fmt: skip
def test_the_name_is_found_however_it_is_written(index: LexiconIndex, name: str) -> None:
    found = weights(index, f"tell me of {name} please")
    assert found == {"harry potter": NAME, "potter": PART, "harry": GIVEN}


def test_a_name_inside_chinese_is_found(index: LexiconIndex) -> None:
    text = "请问Harry Potter是谁"
    assert weights(index, text)["harry potter"] == NAME
    place = {(m.start, m.end) for m in index.read(text).matches if len(m.term) == 2}
    assert {text[start:end] for start, end in place} == {"Harry Potter"}


@pytest.mark.parametrize(
    "text", ["born on 31.07.1980", "born on July 31, 1980", "born on 1980-07-31"]
)
def test_a_date_is_found_in_any_form(index: LexiconIndex, text: str) -> None:
    assert weights(index, text) == {"date 1980-7-31": 7.5}
    (match,) = index.read(text).matches
    assert text[match.start : match.end] == text.removeprefix("born on ")


def test_texts_without_terms_give_nothing(index: LexiconIndex) -> None:
    assert index.read("The weather is fine.").matches == []
    assert index.read("").matches == []
    assert whole(index, "the weather is fine") == [0.0] * FEATURES
    assert LexiconIndex([], lambda word: True).read("Harry Potter").matches == []


# --- Misspellings --------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", ["hogwats", "Hogwrats", "HOGWARTZ", "hoggwarts", "phogwarts"])
def test_a_misspelt_name_counts_less(index: LexiconIndex, typed: str) -> None:
    assert weights(index, f"what is {typed}") == {"hogwarts": PLACE * FUZZY_FACTOR}


def test_two_edits_only_in_long_words(index: LexiconIndex) -> None:
    assert weights(index, "who is voldimart") == {"voldemort": 8.0 * FUZZY_FACTOR}
    assert weights(index, "what is hogwots") == {}
    assert weights(index, "what is ogwarts") == {}, "the first letter is kept"


def test_a_full_name_may_have_a_misspelling_in_each_word(index: LexiconIndex) -> None:
    assert weights(index, "Hary Pottr")["harry potter"] == NAME * FUZZY_FACTOR


def test_a_short_word_misspelt_never_counts_alone(index: LexiconIndex) -> None:
    assert "harry" not in weights(index, "about harrxy")
    assert "harry" not in weights(index, "about hary")


def test_words_of_general_english_are_never_misspellings(shared_encoder: OnnxEncoder) -> None:
    lexicon = Lexicon({("potters",): 8.0, ("castell",): 8.0, ("marlin",): 8.0, ("walthers",): 8.0})
    index = LexiconIndex([lexicon], shared_encoder.is_common)
    assert index.read("the castle, martin and walters").matches == []
    assert len(index.read("the casteell, marlinn and walthres").matches) == 3


def test_a_known_other_word_is_not_taken_for_a_misspelling() -> None:
    terms: Mapping[Words, float] = {("kuwaiti",): 8.0}
    plain = LexiconIndex([Lexicon(terms)], lambda word: False)
    wiser = LexiconIndex([Lexicon(terms, others=frozenset({"kuwaita"}))], lambda word: False)
    assert weights(plain, "about Kuwaita") == {"kuwaiti": 8.0 * FUZZY_FACTOR}
    assert weights(wiser, "about Kuwaita") == {}
    assert weights(wiser, "about Kuwaity") == {"kuwaiti": 8.0 * FUZZY_FACTOR}


def test_a_targets_other_words_are_its_own_matter() -> None:
    terms: Mapping[Words, float] = {("kuwaiti",): 8.0}
    index = LexiconIndex(
        [Lexicon(terms, others=frozenset({"kuwaita"})), Lexicon(terms)], lambda word: False
    )
    assert weights(index, "about Kuwaita", 0) == {}
    assert weights(index, "about Kuwaita", 1) == {"kuwaiti": 8.0 * FUZZY_FACTOR}


# --- Names without vowels, run together, with more inside -----------------------------------------


def test_a_text_without_vowels_is_matched_and_restored(index: LexiconIndex) -> None:
    text = "hrry pttr wnt t hgwrts schl wth hs frnds"
    found = weights(index, text)
    assert found["harry potter"] == NAME * FUZZY_FACTOR
    assert found["hogwarts"] == PLACE * FUZZY_FACTOR
    restored = index.restore_vowels(text)
    assert restored is not None
    assert restored.startswith("harry potter ") and " hogwarts school " in restored
    assert weights(index, restored)["harry potter"] == NAME


def test_restoring_keeps_what_stands_between(index: LexiconIndex) -> None:
    text = "[1] Hrry,  Pttr; wnt t hgwrts schl! (2001)"
    restored = index.restore_vowels(text)
    assert restored is not None
    assert restored.startswith("[1] harry,  potter; ") and restored.endswith("! (2001)")


@pytest.mark.parametrize("text", ["The pttr is here with all its vowels.", "hrry pttr", "", "BBC"])
def test_a_few_words_without_vowels_are_no_such_text(index: LexiconIndex, text: str) -> None:
    assert index.restore_vowels(text) is None
    assert index.read(text).matches == []


@pytest.mark.parametrize("typed", ["#harrypotter", "HarryPotter", "harrypotters"])
def test_a_joined_name_is_the_name(index: LexiconIndex, typed: str) -> None:
    assert weights(index, f"see {typed} now") == {"harry potter": NAME}
    assert whole(index, f"see {typed} now")[1] == NAME


def test_a_joined_name_may_be_misspelt_but_not_weak_or_short() -> None:
    lexicon = Lexicon({("ann", "lee"): 9.0, ("john", "smithson"): STRONG - 0.1})
    index = LexiconIndex([lexicon], lambda word: False)
    assert weights(index, "annlee johnsmithson") == {}
    index = LexiconIndex([WIZARD], lambda word: False)
    assert weights(index, "harrypoter") == {"harry potter": NAME * FUZZY_FACTOR}


@pytest.mark.parametrize(
    "name",
    ["Harry James Potter", "Harry J. Potter", "Harry S Potter", "harry james potter",
     "Harry van Potter", "Harry-James Potter"],
)  # fmt: skip
def test_a_middle_name_is_stepped_over(index: LexiconIndex, name: str) -> None:
    assert weights(index, f"Was {name} there?")["harry potter"] == NAME * MIDDLE_NAME_FACTOR


@pytest.mark.parametrize(
    "text",
    ["Harry and Potter", "Harry met Potter", "Harry's Potter", "Harry, James Potter",
     "Harry. James Potter", "Harry James. Potter", "Harry James Albus Potter"],
)  # fmt: skip
def test_what_is_no_middle_name_is_not(index: LexiconIndex, text: str) -> None:
    assert "harry potter" not in weights(index, f"Was {text} there?")


def test_only_names_of_the_target_have_middle_names() -> None:
    prize = Lexicon({("prix", "goncourt"): 8.0, ("jean", "dupont"): 8.0}, frozenset())
    index = LexiconIndex([prize], lambda word: False)
    assert weights(index, "the Prix Adam Goncourt") == {}
    assert weights(index, "the Prix Goncourt") == {"prix goncourt": 8.0}


# --- Somebody else ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["we saw Mary Potter there", "we saw Potter-Jones there", "we saw Potter Jones there"]
)
def test_a_surname_beside_a_strangers_name_counts_less(index: LexiconIndex, text: str) -> None:
    assert weights(index, text) == {"potter": PART * OTHER_NAME_FACTOR}


@pytest.mark.parametrize(
    "text",
    ["we saw Potter there", "we saw Potter, Jones left", "Mary. Potter came", "we saw mary potter",
     "WE SAW POTTER WIN", "Did The Potter come"],
)  # fmt: skip
def test_a_surname_alone_counts_in_full(index: LexiconIndex, text: str) -> None:
    assert weights(index, text)["potter"] == PART


def test_a_longer_name_of_somebody_else_counts_less(index: LexiconIndex) -> None:
    text = "we walked along the river and saw {} there with many others"
    stranger = weights(index, text.format("John Harry Potter"))
    assert stranger["harry potter"] == NAME * OTHER_NAME_FACTOR
    for name in ("Mr Harry Potter", "Professor Harry Potter", "Harry Potter", "J Harry Potter"):
        assert weights(index, text.format(name))["harry potter"] == NAME, name


@pytest.mark.parametrize(
    "text",
    ["Fans Of Young Harry Potter Gather Outside London Cinema", "FANS OF YOUNG HARRY POTTER GATHER",
     "fans of young harry potter gather"],
)  # fmt: skip
def test_capitals_say_nothing_in_headlines_and_shouting(index: LexiconIndex, text: str) -> None:
    assert weights(index, text)["harry potter"] == NAME


def test_a_mononym_stands_beside_anybody(index: LexiconIndex) -> None:
    assert weights(index, "we read John Voltaire then", 1) == {"voltaire": 8.0}
    assert whole(index, "we read John Voltaire then", 1)[1] == 8.0


def test_a_common_noun_in_small_letters_counts_less(shared_encoder: OnnxEncoder) -> None:
    index = LexiconIndex([Lexicon({("stone",): 8.0})], shared_encoder.is_common)
    assert weights(index, "The stone fell.") == {"stone": 8.0 * OTHER_NAME_FACTOR}
    assert weights(index, "the stone fell") == weights(index, "We met Stone.") == {"stone": 8.0}
    names = frozenset({("stone",), ("rosetta", "stone")})
    named = LexiconIndex([Lexicon({("stone",): 8.0}, names)], shared_encoder.is_common)
    assert weights(named, "The stone fell.") == {"stone": 8.0}, "it names the target"


# --- Features ------------------------------------------------------------------------------------


def test_features_of_a_full_name(index: LexiconIndex) -> None:
    single, full, total, strong, foreign, beside = whole(index, "about Harry Potter of Hogwarts")
    assert (single, full, strong, foreign, beside) == (PLACE, NAME, 3, 0, 0)
    assert total == pytest.approx(math.log1p(NAME + PART + GIVEN + PLACE))


def test_features_speak_of_their_window_only(index: LexiconIndex) -> None:
    text = "we met Harry Potter. " + "nothing to see here. " * 3
    first, second = index.read(text).features(0, [(0, 20), (21, len(text))])
    assert first[1] == NAME and not second.any()
    cut = index.read(text).features(0, [(0, 15)])[0]
    assert cut[1] == 0.0 and cut[0] == GIVEN, "a term must lie in the window as a whole"


def test_a_repeated_term_counts_once(index: LexiconIndex) -> None:
    assert whole(index, "hogwarts hogwarts hogwarts") == whole(index, "hogwarts")


def test_a_window_that_names_somebody_else_says_so(index: LexiconIndex) -> None:
    assert whole(index, "we met Hermann Brock there")[4] == 1.0
    assert whole(index, "we met a friend there")[4] == 0.0
    assert whole(index, "Harry Potter met Hermann Brock there")[4] == 0.0, "the target is named"
    assert whole(index, "at Hogwarts we met Hermann Brock")[4] == 1.0


def test_other_weights_replace_the_lexicons(index: LexiconIndex) -> None:
    text = "about Hogwarts and Potter"
    features = index.read(text).features(0, [(0, len(text))], {("hogwarts",): 3.5})
    assert features[0, 0] == 3.5
    assert features[0, 2] == pytest.approx(math.log1p(3.5))


def test_candidates_hold_the_heaviest_part_and_name(index: LexiconIndex) -> None:
    found = index.read("Harry Potter, hogwats and Voltaire").candidates()
    assert set(found) == {0, 1}
    assert (found[0].single, found[0].full, found[0].strong) == (PART, NAME, 3)
    assert (found[1].single, found[1].full, found[1].strong) == (0.0, 8.0, 1)


def test_a_term_of_too_many_targets_points_at_none_of_them() -> None:
    shared = Lexicon({("acme",): 8.0})

    def candidates(owners: int) -> set[int]:
        return set(LexiconIndex([shared] * owners, lambda word: False).read("Acme").candidates())

    assert candidates(MAX_OWNERS) == set(range(MAX_OWNERS))
    assert candidates(MAX_OWNERS + 1) == set()
    index = LexiconIndex([shared] * (MAX_OWNERS + 1), lambda word: False)
    assert weights(index, "Acme", MAX_OWNERS) == {"acme": 8.0}, "beside another it still counts"


def test_names_anything() -> None:
    def common(word: str) -> bool:
        return word not in {"zorblax"}

    text = "We met Brock. He was kind. a zorblax"
    windows = [(0, 13), (14, 26), (27, len(text))]
    assert names_anything(text, windows, common).tolist() == [True, False, True]
    assert not names_anything("WE MET BROCK", [(0, 12)], common).any()


# --- Many targets --------------------------------------------------------------------------------


def test_ten_thousand_lexicons_give_the_matches_of_one(shared_encoder: OnnxEncoder) -> None:
    made = itertools.product("bcdfghjklm", "aeiou", string.ascii_lowercase[:20], "aeiou", "xz")
    crowd = [
        Lexicon(
            {(f"{a}{b}{c}q", f"{c}{d}{e}woq"): 8.0, (f"{c}{d}{e}woq",): 6.0},
            frozenset({(f"{a}{b}{c}q", f"{c}{d}{e}woq")}),
        )
        for a, b, c, d, e in made
    ]
    assert len(crowd) == 10_000
    many = LexiconIndex([*crowd, WIZARD], shared_encoder.is_common)
    one = LexiconIndex([WIZARD], shared_encoder.is_common)
    for text in (
        "Harry James Potter at Hogwats, 31.07.1980",
        "we saw Mary Potter with #harrypotter and voldimart",
        "hrry pttr wnt t hgwrts schl wth hs frnds",
        "nothing here",
    ):
        assert weights(many, text, len(crowd)) == weights(one, text, 0), text
        assert whole(many, text, len(crowd)) == whole(one, text, 0), text
        assert weights(many, text, 77) == {}, text
    name = " ".join(*crowd[4321].primary)
    assert set(many.read(f"about {name}").candidates()) >= {4321}


def test_reading_is_a_pure_function(index: LexiconIndex) -> None:
    def seen(reading: LexicalReading) -> list[tuple[int, int, Words, float]]:
        return [(m.start, m.end, m.term, m.factor) for m in reading.matches]

    text = "Hary Pottr of hogwats"
    first = seen(index.read(text))
    index.read("other Potter texts at hogwrats")
    assert first and seen(index.read(text)) == first


def test_a_prepared_text_is_read_like_any_other(index: LexiconIndex) -> None:
    for text in (
        "Hary Pottr met Hermann Brock at Hogwarts on 31.07.1980",
        "hrry pttr wnt t hgwrts schl wth hs frnds",
        "",
    ):
        ready, windows = PreparedText(text), [(0, len(text)), (0, 12)]
        for _ in range(2):
            plain, prepared = index.read(text), index.read(text, ready)
            assert prepared.matches == plain.matches
            assert np.array_equal(prepared.features(0, windows), plain.features(0, windows))


# --- Written down --------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    lexicon = Lexicon(
        {("josé", "波特"): 8.12345, ("date 1980-7-31",): 3.0},
        frozenset({("josé", "波特")}),
        frozenset({"jose"}),
    )
    again = Lexicon.from_json(lexicon.to_json())
    assert again.weights == pytest.approx(lexicon.weights, abs=1e-4)
    assert (again.primary, again.others) == (lexicon.primary, lexicon.others)
    assert Lexicon.from_json(Lexicon({}).to_json()) == Lexicon({})


def test_json_does_not_depend_on_the_order() -> None:
    shuffled = Lexicon(dict(reversed(list(WIZARD.weights.items()))), WIZARD.primary)
    assert shuffled.to_json() == WIZARD.to_json()


GOOD: dict[str, object] = {"format": 2, "terms": [[["a"], 3.0]], "primary": [["a"]], "others": []}


def test_the_undamaged_form_of_the_damaged_is_read() -> None:
    assert Lexicon.from_json(json.dumps(GOOD).encode()).weights == {("a",): 3.0}


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"{", b"[" * 100_000, b"{}"])
def test_what_is_no_lexicon_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="lexicon"):
        Lexicon.from_json(data)


@pytest.mark.parametrize(
    "change",
    [
        {"terms": [1]}, {"terms": [["a", 3.0]]}, {"terms": [[[], 3.0]]}, {"terms": [[[1], 3.0]]},
        {"terms": [[[""], 3.0]]}, {"terms": [[["a"], "x"]]}, {"terms": [[["a"], float("nan")]]},
        {"terms": [[["a"], float("inf")]]}, {"terms": [[["a"], 10**400]]}, {"terms": None},
        {"primary": ["ab"]}, {"primary": 1}, {"others": "ab"}, {"others": [1]}, {"others": {}},
    ],
)  # fmt: skip
def test_a_damaged_lexicon_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="lexicon"):
        Lexicon.from_json(json.dumps({**GOOD, **change}).encode())


def test_features_are_finite_for_any_windows(index: LexiconIndex) -> None:
    text = "Harry Potter"
    features = index.read(text).features(0, [(0, 0), (5, 3), (0, 10_000)])
    assert features.shape == (3, FEATURES) and np.isfinite(features).all()
    assert not features[:2].any() and features[2, 1] == NAME


# --- Titles of works -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(shared_encoder: OnnxEncoder) -> LexiconIndex:
    return LexiconIndex([NOVELIST], shared_encoder.is_common)


@pytest.mark.parametrize(
    "text",
    [
        "What happens in the book The City That Crumbled?",
        "Summarise “the city that crumbled” for me.",
        "I like Reel Lives. What else is like it?",
        "Summarise the plot of 'reel lives', please.",
        "who wrote the city that crumbled",
        "who wrote The City That Crumbled",
        "The City That Crumbled",
    ],
)
def test_the_title_of_a_work_names_its_target_as_part_of_a_name_would(
    shelf: LexiconIndex, text: str
) -> None:
    assert whole(shelf, text)[1] == pytest.approx(PART_WORTH)
    assert shelf.read(text).candidates()[0].full == pytest.approx(PART_WORTH)


@pytest.mark.parametrize(
    "text",
    [
        "The news spoke of a city that crumbled in an earthquake.",
        "He caught two fish with reel lives of line left.",
        "who has reel lives",
        "THE CITY THAT CRUMBLED IN A DAY",
        "How Reel Lives Of Fishermen Really Look",
        "I read Real Lives, a magazine.",
    ],
)
def test_the_same_words_as_words_do_not(shelf: LexiconIndex, text: str) -> None:
    assert whole(shelf, text)[1] == 0.0


def test_titles_are_kept_with_the_lexicon() -> None:
    assert Lexicon.from_json(NOVELIST.to_json()) == NOVELIST
